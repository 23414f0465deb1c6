//! The harness of the whole-machine tests: fixtures that end with the test, waits that end in time, and
//! evidence when a test fails. What a backend author's own tests use as well is in the crate
//! `outboard-testkit`, and named here again.
//!
//! | module | what it holds |
//! |--|--|
//! | [`place`] | what this host has: a KVM, a program under test, stock kernels |
//! | [`wait`], [`scratch`] | bounded waits; files that vanish |
//! | [`launch`], [`capture`], [`stats`] | the program in a process of its own |
//! | [`machine`] | a machine in this process |
//! | [`payload`] | the tiny kernel |
//! | [`guest`] | a stock Linux, and commands run there |
//! | [`pty`] | a terminal to run the program on |
//! | [`daemon`], [`qmp`] | Debian's `qemu-storage-daemon` as the backend |
//! | [`served`], [`disk`] | a backend in this process, on the crate `vhost-user-backend`; such a backend with a disk in memory |
//! | [`gadget`] | such a backend with what few backends do: shared memory, shared objects |
//! | [`backends`] | backends that others wrote, and guests with the drivers for them |
//! | [`switch`] | Open vSwitch with two ports |
//! | [`qemu_server`] | QEMU as a vfio-user server of its own devices |
//! | [`vfio`] | our vfio-user servers on the crate `vfio_user`, and guests that drive them |
//! | [`explained`] | what the program says when it cannot do something |
//! | [`peer`], [`proxy`] | backends that misbehave; a proxy that sees all messages |
//!
//! Must never wait without a deadline, and must never leave a process, a socket or a file.

// All of this is test code: a failed assumption is a failed test, and says so where it happens.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

pub use outboard_testkit::kernel as payload;
pub use outboard_testkit::{disk, machine, scratch, served, wait};

pub mod backends;
pub mod capture;
pub mod daemon;
pub mod display;
pub mod explained;
pub mod gadget;
pub mod guest;
pub mod launch;
pub mod peer;
pub mod place;
pub mod proxy;
pub mod pty;
pub mod qemu_server;
pub mod qmp;
pub mod stats;
pub mod switch;
pub mod vfio;
