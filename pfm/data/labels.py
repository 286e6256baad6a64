"""Labels of single outputs, liked or not, by the words that data sets use for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pfm.data.errors import PreferenceDataError, show

__all__ = ["ClassName", "read_label"]

_WORDS = (
    ("true", "false"), ("1", "0"), ("1.0", "0.0"), ("yes", "no"), ("y", "n"), ("liked", "disliked"),
    ("like", "dislike"), ("good", "bad"), ("positive", "negative"), ("pos", "neg"),
    ("up", "down"), ("thumbs_up", "thumbs_down"),
    ("thumbsup", "thumbsdown"), ("👍", "👎"), ("chosen", "rejected"), ("preferred", "dispreferred"),
    ("accepted", "rejected"), ("accept", "reject"), ("desirable", "undesirable"), ("helpful", "unhelpful"),
    ("correct", "incorrect"), ("right", "wrong"), ("pass", "fail"), ("better", "worse"),
)  # fmt: skip
_MEANING = {word: liked for words in _WORDS for word, liked in zip(words, (True, False), strict=True)}


class ClassName(str):
    """A class's name in the place of the number that ``datasets.ClassLabel`` stores, which has no meaning by itself."""

    __slots__ = ()


def read_label(value: Any) -> bool:
    """Return whether a label says liked: a boolean, 1 or 0, or a word such as "liked", "yes" or "good".

    Raises:
        PreferenceDataError: the label says neither.
    """
    if isinstance(value, bool):
        return value
    word = str(value).strip().casefold().replace(" ", "_").replace("-", "_")
    if word in _MEANING:
        return _MEANING[word]
    what = f"the class {str(value)!r}" if isinstance(value, ClassName) else show(value)
    raise PreferenceDataError(
        f"got {what}; expected true or false, or a word for one of them such as 'liked'/'disliked', 'yes'/'no', "
        "'good'/'bad'",
        reason="wrong type",
        column="label",
    )


def class_name(names: Sequence[str], value: Any) -> Any:
    """Return the name of a class by its number; -1, by which ``datasets`` marks an unknown class, is no label."""
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    return ClassName(names[value]) if 0 <= value < len(names) else None


def class_names(features: Any) -> Mapping[str, Sequence[str]]:
    """Return the names of the classes of a column ``label``, from a data set's features or from their JSON form."""
    feature = features.get("label") if isinstance(features, Mapping) else None
    if isinstance(feature, Mapping):
        names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    else:
        names = getattr(feature, "names", None) if type(feature).__name__ == "ClassLabel" else None
    return {"label": names} if names else {}
