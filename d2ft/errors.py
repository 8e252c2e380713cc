"""The one exception type for what a user can put right."""


class UserError(ValueError):
    """
    Bad input, described so that its owner can mend it.

    The message says what is wrong, where (file, key, line or class) and what would have
    worked. Tools print it without a traceback and exit with 1; everything else that is raised
    is a defect of d2ft or of its environment and keeps its traceback.
    """
