//! transport (skeleton).
