//! The harness of the whole-machine tests: fixtures that end with the test, waits that end in time, and evidence when
//! one fails. Design §6.
//!
//! | module | what it holds |
//! |--|--|
//! | [`place`] | what this host has: a KVM, a program under test, stock kernels |
//! | [`wait`], [`scratch`] | bounded waits; files that vanish |
//! | [`launch`], [`capture`], [`stats`] | the program in a process of its own |
//! | [`guest`] | a stock Linux in it, and commands run there |
//! | [`pty`] | a terminal to run it on |
//! | [`daemon`], [`qmp`] | Debian's `qemu-storage-daemon` as the backend |
//! | [`disk`] | an independent backend in this process, on the crate `vhost-user-backend` |
//! | [`gadget`] | the same with what few backends do: shared memory, shared objects |
//! | [`served`] | how both start and end |
//! | [`backends`] | backends that others wrote, and guests with the drivers for them |
//! | [`switch`] | Open vSwitch with two ports |
//! | [`qemu_server`] | QEMU as a vfio-user server of its own devices |
//! | [`vfio`] | our vfio-user servers on the crate `vfio_user`, and guests that drive them |
//! | [`explained`] | what the program says when it cannot do something |
//! | [`peer`], [`proxy`] | backends that do not what they should; one that listens in |
//! | [`library`] | a `vmm::Machine` in this process |
//! | [`payload`] | the tiny kernel |
//!
//! Must never wait without a deadline, and must never leave a process, a socket or a file.

// All of this is test code: a failed assumption is a failed test, and says so where it happens.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

pub mod backends;
pub mod capture;
pub mod daemon;
pub mod disk;
pub mod display;
pub mod explained;
pub mod gadget;
pub mod guest;
pub mod launch;
pub mod library;
#[path = "../payload/mod.rs"]
pub mod payload;
pub mod peer;
pub mod place;
pub mod proxy;
pub mod pty;
pub mod qemu_server;
pub mod qmp;
pub mod scratch;
pub mod served;
pub mod stats;
pub mod switch;
pub mod vfio;
pub mod wait;
