"""Problems whose exact result is known: distributions of outputs before and after."""
