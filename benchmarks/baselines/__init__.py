"""Networks, policies and rewards that the compared methods are made of."""
