//! What the fuzz targets share.
//!
//! | module | what it holds |
//! |--|--|
//! | [`input`] | the fuzzer's bytes, read as numbers, choices and ranges |
//! | [`descriptors`] | no descriptor is left open; files of every kind for a peer to send |
//! | [`peer`] | a vhost-user backend without a thread, whose answers are the fuzzer's |
//! | [`driver`] | a virtio driver that writes anything anywhere |
//! | [`handler`] | a machine that takes a backend's own requests seriously |
//! | [`ports`] | a machine without KVM that holds devices to the rules of its ports |
//! | [`server`] | the same for vfio-user: a server without a thread |
//! | [`seeds`] | inputs to begin with |
//!
//! A target must depend on nothing but its input: the same bytes, the same outcome.

pub mod descriptors;
pub mod driver;
pub mod handler;
pub mod input;
pub mod peer;
pub mod ports;
pub mod seeds;
pub mod server;
