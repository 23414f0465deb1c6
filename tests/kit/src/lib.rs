//! What the tests of a vhost-user backend or a vfio-user server need: a whole machine in the test's own
//! process, without a program to start, a kernel to download or a disk image to make. It needs `/dev/kvm`, of
//! any kind, and gcc to build the tiny kernel.
//!
//! | module | what it holds |
//! |--|--|
//! | [`machine`] | a machine with the tiny kernel: devices are added, the console is waited for, a failure shows what was seen |
//! | [`kernel`] | the tiny kernel, its command line, and its answers |
//! | [`served`] | a backend made with the crate `vhost-user-backend`, on a thread of the test |
//! | [`disk`] | such a backend: a disk in memory |
//! | [`wait`], [`scratch`] | waits that end; a folder for files and sockets |
//!
//! # A backend's own test
//! The dependencies of this test are `outboard-testkit` and what the backend is made of: `vhost`,
//! `vhost-user-backend`, `virtio-queue`, `vm-memory` and `vmm-sys-util`, in the versions of this workspace.
#![doc = concat!("```no_run\n", include_str!("../example/own_backend.rs"), "\n```")]
// All of this is test code: a failed assumption is a failed test, and says so where it happens.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

pub mod disk;
pub mod kernel;
pub mod machine;
pub mod scratch;
pub mod served;
pub mod wait;
