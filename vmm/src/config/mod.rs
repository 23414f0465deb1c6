//! What to build: plain data, however it was written.
//!
//! The command line and the TOML file both end here; so does a test that fills the structs by hand.
//! Nothing in this module opens a file or talks to a peer.

mod parse;
mod toml_file;
mod vfio_user;

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::error::Error;

use devices::virtio::backend::vhost_user::Order;
use devices::virtio::ring::address::Iommu;
use devices::virtio::types::table::Wishes;
pub(crate) use parse::parse_device_type;
pub use parse::{parse_memory, parse_serial, parse_vhost_user};
pub use toml_file::load as load_toml;
use transport::peer::Trace;
pub use vfio_user::{VfioUser, parse_vfio_user};

/// How long a peer may take over one request, unless `deadline=` says otherwise.
pub const DEFAULT_DEADLINE: Duration = Duration::from_millis(2000);

/// The kernel command line when none is given.
///
/// * `console=ttyS0` – the serial port is the only console.
/// * `panic=-1` – a panic reboots at once: a machine that hangs helps nobody.
/// * `pci=off`, `8250.nr_uarts=1` – there is no PCI bus and one serial port: nothing is searched in vain.
/// * `cryptomgr.notests` – the self-tests of the kernel's ciphers take a third of a stock kernel's start.
///
/// With PCI devices it is [`DEFAULT_CMDLINE_WITH_PCI`].
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 panic=-1 pci=off 8250.nr_uarts=1 cryptomgr.notests";

/// The same for a machine with PCI devices. `pci=noearly`: there are none of the chipsets that need early care.
pub const DEFAULT_CMDLINE_WITH_PCI: &str =
    "console=ttyS0 panic=-1 pci=noearly 8250.nr_uarts=1 cryptomgr.notests";

/// One machine.
pub struct Config {
    /// The kernel image: bzImage or ELF.
    pub kernel: Image,
    /// The initial RAM file system.
    pub initramfs: Option<Image>,
    /// The kernel command line; [`Config::default_cmdline`] when absent.
    pub cmdline: Option<String>,
    /// Guest RAM.
    pub memory: Memory,
    /// vCPUs, 1 to 255.
    pub cpus: u8,
    /// virtio devices served by vhost-user backends, in the order of their guest addresses.
    pub vhost_user: Vec<VhostUser>,
    /// PCI devices served by vfio-user servers, in the order of their device numbers.
    pub vfio_user: Vec<VfioUser>,
    /// Where the serial console goes.
    pub serial: Serial,
    /// What a guest's reset does.
    pub on_reset: OnReset,
    /// How the guest is told of its virtio-mmio devices.
    pub discovery: arch::platform::Discovery,
    /// Who sees every message exchanged with a peer.
    pub trace: Option<Arc<dyn Trace>>,
}

impl Config {
    /// A machine with one vCPU, 256 MiB, no devices and no console, that ends at a reset.
    pub fn new(kernel: Image) -> Self {
        Config {
            kernel,
            initramfs: None,
            cmdline: None,
            memory: Memory::default(),
            cpus: 1,
            vhost_user: Vec::new(),
            vfio_user: Vec::new(),
            serial: Serial::Null,
            on_reset: OnReset::Exit,
            discovery: arch::platform::Discovery::Acpi,
            trace: None,
        }
    }

    /// Whether the machine has a PCI bus: only when a device is on it. Looking over an empty one takes a stock kernel
    /// some 500 exits, and `pci=off` none.
    #[must_use]
    pub fn has_pci(&self) -> bool {
        !self.vfio_user.is_empty() || self.vhost_user.iter().any(|device| device.transport == Transport::Pci)
    }

    /// The kernel command line for who gave none.
    #[must_use]
    pub fn default_cmdline(&self) -> &'static str {
        if self.has_pci() { DEFAULT_CMDLINE_WITH_PCI } else { DEFAULT_CMDLINE }
    }
}

/// A file whose contents the guest gets.
#[derive(Clone, Debug)]
pub enum Image {
    /// A path, opened when the machine is built.
    Path(PathBuf),
    /// An open file, read from offset 0.
    File(Arc<File>),
    /// Bytes at hand, such as a tiny kernel inside a test.
    Bytes(Arc<[u8]>),
}

impl fmt::Display for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Image::Path(path) => write!(f, "{}", path.display()),
            Image::File(_) => f.write_str("(an open file)"),
            Image::Bytes(bytes) => write!(f, "({} bytes in memory)", bytes.len()),
        }
    }
}

/// Guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Bytes; a multiple of 2 MiB.
    pub size: u64,
    /// The kind of pages behind it.
    pub hugepages: arch::ram::Hugepages,
}

impl Default for Memory {
    fn default() -> Self {
        Memory { size: 256 << 20, hugepages: arch::ram::Hugepages::Off }
    }
}

/// One virtio device whose queues a vhost-user backend serves.
#[derive(Debug)]
pub struct VhostUser {
    /// Which device, how many queues, which features.
    pub order: Order,
    /// How the guest sees it.
    pub transport: Transport,
    /// Where the backend is.
    pub socket: Socket,
    /// Its name in messages and statistics; the type and a number when absent.
    pub id: Option<String>,
    /// How long the backend may take over one request.
    pub deadline: Duration,
    /// How long a backend that is not there, or is lost, is waited for; zero: for ever. Absent: not at all.
    pub reconnect: Option<Duration>,
    /// Who connects to whom.
    pub role: Role,
    /// What the driver's addresses are, when they are not simply guest addresses.
    pub iommu: Option<Iommu>,
}

/// How the guest sees a virtio device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// A page of registers and an interrupt line.
    #[default]
    Mmio,
    /// A PCI function with MSI-X.
    Pci,
}

/// Who connects to whom on a [`Socket::Path`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// The backend listens.
    #[default]
    Client,
    /// We listen, and the backend connects.
    Server,
}

impl VhostUser {
    /// A device of the type called `kind` (`blk`, `net`, … `generic:ID`) at `socket`, everything else by
    /// default.
    ///
    /// # Errors
    /// When there is no such type.
    pub fn new(kind: &str, socket: Socket) -> Result<Self, Error> {
        let device_type = parse_device_type(kind)?;
        let order = Order::new(device_type, Wishes::default(), "")
            .map_err(|error| Error::internal("cannot use the default features").because(error))?;
        Ok(VhostUser {
            order,
            transport: Transport::default(),
            socket,
            id: None,
            deadline: DEFAULT_DEADLINE,
            reconnect: None,
            role: Role::Client,
            iommu: None,
        })
    }
}

/// Where a peer is found.
#[derive(Debug)]
pub enum Socket {
    /// A unix socket that the peer listens on.
    Path(PathBuf),
    /// A connected stream inherited from whoever started us, and its number.
    Inherited(UnixStream, i32),
    /// A connected stream, such as one end of a socket pair.
    Stream(UnixStream),
}

impl fmt::Display for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Socket::Path(path) => write!(f, "{}", path.display()),
            Socket::Inherited(_, fd) => write!(f, "fd {fd}"),
            Socket::Stream(_) => f.write_str("(a connected socket)"),
        }
    }
}

/// Where the serial console goes.
#[derive(Clone)]
pub enum Serial {
    /// Standard input and output; raw mode when standard input is a terminal.
    Stdio,
    /// Nowhere.
    Null,
    /// Appended to nothing: the file is created or truncated.
    File(PathBuf),
    /// A unix socket that we listen on; one client at a time.
    Socket(PathBuf),
    /// A sink of the caller's, such as [`Serial::buffer`].
    Sink(Arc<Mutex<dyn Write + Send>>),
}

impl Serial {
    /// A console kept in memory, and the memory.
    pub fn buffer() -> (Self, Arc<Mutex<Vec<u8>>>) {
        let buffer = Arc::new(Mutex::new(Vec::new()));
        (Serial::Sink(Arc::clone(&buffer) as Arc<Mutex<dyn Write + Send>>), buffer)
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Serial::Stdio => f.write_str("Stdio"),
            Serial::Null => f.write_str("Null"),
            Serial::File(path) => f.debug_tuple("File").field(path).finish(),
            Serial::Socket(path) => f.debug_tuple("Socket").field(path).finish(),
            Serial::Sink(_) => f.write_str("Sink"),
        }
    }
}

/// What a guest's reset does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnReset {
    /// The machine starts again, with the same backend connections.
    Reboot,
    /// The machine ends as if powered off.
    Exit,
}
