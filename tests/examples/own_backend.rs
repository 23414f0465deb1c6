//! For the author of a vhost-user backend: a whole machine inside your own test, without a program to start, a kernel
//! to download or a disk image to make. It boots a kernel of 10 KiB that reads 1 000 blocks through your backend.
//!
//! ```text
//! cargo run -p outboard-tests --example own_backend
//! ```

use std::error::Error;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use outboard_tests::disk::MemoryDisk;
use outboard_tests::payload::{CommandLine, field, tiny_kernel};
use vmm::config::{Config, Image, Serial, Socket, VhostUser};
use vmm::{End, Machine};

/// The test that yours would be.
///
/// # Errors
/// Those of the machine.
///
/// # Panics
/// When the backend or the machine did not do what it should.
pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    // Your backend: here one that keeps its disk in memory. A socket that it listens on will do, and so will one end of
    // `UnixStream::pair()` when it serves the other.
    let backend = MemoryDisk::new(1 << 20);
    let socket = UnixStream::connect(backend.socket())?;

    // The machine: a kernel, its command line, a device, and a console that is kept in memory. Where the first device
    // is, `vmm::machine` decides; the tiny kernel has to be told.
    let place = arch::layout::virtio_mmio_slot(0).ok_or("no room for a device")?;
    let line = CommandLine::new("blk").device(place.base.0, place.gsi.0).arg("n", 1000);
    let mut config = Config::new(Image::Bytes(Arc::from(tiny_kernel())));
    config.cmdline = Some(line.to_string());
    config.memory.size = 32 << 20;
    config.vhost_user.push(VhostUser::new("blk", Socket::Stream(socket))?);
    let (serial, console) = Serial::buffer();
    config.serial = serial;

    // Runs until the guest powers off, as the binary would.
    let outcome = Machine::build(config)?.run()?;

    // What the guest saw, and what the machine counted.
    let console = String::from_utf8_lossy(&console.lock().map_err(|_| "a writer panicked")?).into_owned();
    println!("{console}");
    assert_eq!(outcome.end, End::PowerOff);
    assert_eq!((field(&console, "requests"), field(&console, "errors")), (Some(1000), Some(0)), "{console}");
    let device = outcome.stats.devices.first().ok_or("no statistics of the device")?;
    assert_eq!(device.requests_through_vmm, 0, "the machine is off the hot path");
    assert_eq!(backend.served(), 1000);
    println!("{} exits in all, {} messages to the backend", outcome.stats.exits, device.peer.messages);
    Ok(())
}
