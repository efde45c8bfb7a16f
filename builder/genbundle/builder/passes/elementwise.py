"""Operators that do the same to each number, wherever it stands."""

EACH = {"Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "Mish", "Neg", "QuickGelu", "Relu", "Sigmoid", "Tanh"}
PAIRS = {"Add", "Div", "Mul", "Pow", "Sub"}
