"""SGD-PH: norm parameters stepped by their Hessian diagonal."""
