//! The `vmm` library (skeleton).
