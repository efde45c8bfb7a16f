"""Operators that do the same to each number, wherever it stands."""

EACH = {"Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "Mish", "Neg", "QuickGelu", "Relu", "Sigmoid", "Tanh"}
GELUS = {"BiasGelu": "Gelu", "FastGelu": "FastGelu"}
"""ONNX Runtime's of the sum with a bias, a number for each feature, and what they are without it."""
PAIRS = {"Add", "Div", "Mul", "Pow", "Sub"}
