//! arch (skeleton).
