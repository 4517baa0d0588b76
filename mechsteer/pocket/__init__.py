"""The pocket model: a small chat model with known behaviours that ships with mechsteer, its language and its checks."""
