//! devices (skeleton).
