//! outboard as a library: everything that the command line does.
//!
//! ```no_run
//! use vmm::config::{Config, Image, Serial, VhostUser};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // One end goes to the machine, the other to the backend under test.
//! let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
//! # drop(theirs);
//! let mut config = Config::new(Image::Path("/path/to/tiny-kernel".into()));
//! config.vhost_user.push(VhostUser::blk(ours));
//! let (serial, console) = Serial::buffer();
//! config.serial = serial;
//!
//! let outcome = vmm::Machine::build(config)?.run()?;
//! println!("{}", String::from_utf8_lossy(&console.lock().map_err(|_| "poisoned")?));
//! assert_eq!(outcome.stats.devices[0].requests_through_vmm, 0);
//! # Ok(())
//! # }
//! ```
//!
//! | chapter | what it holds |
//! |--|--|
//! | [`cli`], [`config`] | the command line and the configuration as plain data |
//! | [`machine`], `board` | the build of a machine and of its hardware, as numbered steps |
//! | [`host`] | KVM, memory mappings and slots, raw descriptors (the only unsafe code) |
//! | [`life`] | vCPU threads: running, stopping, counting exits |
//! | `devices` | the machine's devices, and the thread that answers peers' own requests |
//! | `control` | the control loop, and the statistics |
//! | [`console`] | the other end of the guest's serial port |
//! | [`tools`] | the commands `check` and `probe`, and the trace of messages |

mod board;
pub mod cli;
pub mod config;
pub mod console;
mod control;
mod devices;
pub mod error;
mod handle;
pub mod host;
pub mod life;
mod logging;
pub mod machine;
pub mod stats;
pub mod tools;

pub use error::Error;
pub use handle::{End, Event, Handle};
pub use machine::{Machine, Outcome};
