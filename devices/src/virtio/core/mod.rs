//! The virtio device itself, whatever its type and transport.

pub mod device;
pub mod face;
pub mod handle;
pub mod queues;
pub mod registers;
pub mod report;
pub mod service;
pub mod start;
pub mod state;
pub mod status;
pub mod vacancy;
