"""One page of the three experiments of Preference Flow Matching (arXiv 2405.19806): control, images, text."""
