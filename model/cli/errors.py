"""What a user can mend, in one line that says how to go on; everything else is a defect and keeps its traceback."""

from __future__ import annotations

# KeyError and RuntimeError too: libraries raise them for wrong names in files and for tensors that do not fit.
_USER_ERRORS = (ValueError, TypeError, OSError, ImportError, KeyError, RuntimeError, MemoryError)

#: What says so: torch, the system (of mapped files too), and C++.
_OUT_OF_MEMORY = ("can't allocate memory", "Cannot allocate memory", "bad_alloc")

_SMALLER = (
    "training takes less with a smaller micro_batch_size, activation_checkpointing=true or language_model_training=lora, "
    "answering with a smaller --max_new_tokens or fewer pictures at once"
)


def explain(error: Exception) -> str | None:
    """One line for an error that the user can mend; None for any other."""
    text = " ".join(str(error).split()) or type(error).__name__
    # By name, so that nothing is imported that the command did not need.
    names = {kind.__name__ for kind in type(error).__mro__}
    if "OutOfMemoryError" in names or isinstance(error, MemoryError) or any(words in text for words in _OUT_OF_MEMORY):
        return f"out of memory ({text.split('. ')[0]}); {_SMALLER}"
    if "SafetensorError" in names:
        return f"a file of weights is damaged or incomplete ({text}); copy or download it again"
    if isinstance(error, KeyError):
        return f"there is no entry {text} where one is expected; the file or name that it was looked up in is of another kind"
    return text if isinstance(error, _USER_ERRORS) else None
