"""Problems whose exact result is known: laws of outputs before and after."""
