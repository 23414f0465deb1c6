//! outboard as a library: everything that the command line does.
//!
//! ```no_run
//! use vmm::config::{Config, Image, Serial, Socket, VhostUser};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // One end goes to the machine, the other to the backend under test.
//! let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
//! # drop(theirs);
//! let mut config = Config::new(Image::Path("/path/to/tiny-kernel".into()));
//! config.vhost_user.push(VhostUser::new("blk", Socket::Stream(ours))?);
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
//! | module | what it holds |
//! |--|--|
//! | [`cli`], [`config`] | from words to plain data |
//! | [`machine`], `board` | the wiring: one list read from top to bottom |
//! | [`kvm`], [`memory`], [`peer_memory`] | `devices::ports` on KVM |
//! | `memory`, `descriptors` | the only unsafe code: addresses and raw descriptors |
//! | [`vcpu`], [`lifecycle`] | running, stopping, counting exits |
//! | `control`, `peers`, `console` | everything that is not a guest's exit |
//! | [`workbench`] | `check` and its like |

mod attach;
mod board;
pub mod cli;
pub mod config;
mod console;
mod control;
mod crash;
mod descriptors;
pub mod error;
#[doc(hidden)]
mod huge_memory;
pub mod keyboard;
pub mod kvm;
pub mod lifecycle;
mod logging;
pub mod machine;
pub mod memory;
pub mod peer_memory;
mod peers;
mod recovery;
mod shared_objects;
pub mod stats;
mod terminal;
pub mod vcpu;
mod vfio_user;
mod windows;
pub mod workbench;

pub use error::Error;
pub use machine::{End, Handle, Machine, Outcome};
