//! The devices of a machine, as data with builders. The command line's parser uses the same builders.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use devices::pci::vfio_user::Wishes as FunctionWishes;
use devices::pci::vfio_user::link::Writes;
use devices::virtio::backend::spec::{Display, Order};
use devices::virtio::ring::address::Iommu;
use devices::virtio::types::table::{DeviceType, Wishes};

use crate::error::Error;

/// How long a peer may take over one request, unless `deadline=` says otherwise.
pub const DEFAULT_DEADLINE: Duration = Duration::from_millis(2000);

/// Where a peer is found.
#[derive(Debug)]
pub enum Socket {
    /// The path of a unix socket, or `@NAME` for an abstract one.
    Path(PathBuf),
    /// A connected stream inherited from the process that started outboard, and its number.
    Inherited(UnixStream, i32),
    /// A connected stream, such as one end of a socket pair.
    Stream(UnixStream),
}

impl From<UnixStream> for Socket {
    fn from(stream: UnixStream) -> Self {
        Socket::Stream(stream)
    }
}

/// A path.
impl<P: AsRef<OsStr> + ?Sized> From<&P> for Socket {
    fn from(path: &P) -> Self {
        Socket::Path(PathBuf::from(path.as_ref()))
    }
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

/// Refuses what can be no address of a unix socket: `sun_path` has 108 bytes, with a NUL at one end.
pub(super) fn check_socket_path(path: &Path) -> Result<(), Error> {
    let bytes = path.as_os_str().as_bytes();
    let (bytes, longest) = match bytes.strip_prefix(b"@") {
        Some(name) => (name, "an abstract name has at most 107 bytes"),
        None => (bytes, "a socket's path has at most 107 bytes: use a shorter one, or a relative one"),
    };
    match bytes.len() {
        0 => Err(Error::usage("the path of a socket is empty").hint("write socket=PATH, or socket=@NAME")),
        1..=107 => Ok(()),
        len => {
            Err(Error::usage(format!("the path of the socket {} has {len} bytes", path.display()))
                .hint(longest))
        }
    }
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

/// One virtio device whose queues a vhost-user backend serves.
#[derive(Debug)]
#[expect(missing_docs, reason = "each field has a builder method of the same name, which says what it is")]
pub struct VhostUser {
    pub kind: String,
    pub socket: Socket,
    pub id: Option<String>,
    pub transport: Transport,
    pub role: Role,
    pub deadline: Duration,
    pub reconnect: Option<Duration>,
    pub queues: Option<u16>,
    pub queue_size: Option<u16>,
    pub config_size: Option<u16>,
    pub tag: Option<String>,
    pub mtu: Option<u16>,
    pub mac: Option<[u8; 6]>,
    pub features: String,
    pub iommu: Option<Iommu>,
    pub display: Option<Display>,
}

macro_rules! device_types {
    ($($name:ident)*) => {
        $(
            #[doc = concat!("A device of the type `", stringify!($name), "`; see [`VhostUser::new`].")]
            pub fn $name(socket: impl Into<Socket>) -> Self {
                Self::new(stringify!($name), socket)
            }
        )*
        #[cfg(test)]
        pub(super) const CONSTRUCTORS: &[&str] = &[$(stringify!($name)),*];
    };
}

impl VhostUser {
    /// A device of the type called `kind` (`blk`, `net`, … `generic:ID`), with its backend at `socket` and everything
    /// else by default. A type that is not known is an error when the machine is built.
    pub fn new(kind: impl Into<String>, socket: impl Into<Socket>) -> Self {
        VhostUser {
            kind: kind.into(),
            socket: socket.into(),
            id: None,
            transport: Transport::default(),
            role: Role::default(),
            deadline: DEFAULT_DEADLINE,
            reconnect: None,
            queues: None,
            queue_size: None,
            config_size: None,
            tag: None,
            mtu: None,
            mac: None,
            features: String::new(),
            iommu: None,
            display: None,
        }
    }

    device_types! { net blk console rng scsi gpu rtc input vsock crypto sound fs scmi i2c can gpio spi media }

    /// Its name in messages and statistics; the type and a number when absent.
    #[must_use]
    pub fn id(self, id: impl Into<String>) -> Self {
        VhostUser { id: Some(id.into()), ..self }
    }

    /// The guest sees a PCI function in place of a virtio-mmio device.
    #[must_use]
    pub fn pci(self) -> Self {
        VhostUser { transport: Transport::Pci, ..self }
    }

    /// We listen on the path, and the backend connects.
    #[must_use]
    pub fn server(self) -> Self {
        VhostUser { role: Role::Server, ..self }
    }

    /// How long the backend may take over one request.
    #[must_use]
    pub fn deadline(self, deadline: Duration) -> Self {
        VhostUser { deadline, ..self }
    }

    /// How long a backend that is not there, or is lost, is waited for; zero: for ever. By default not at all.
    #[must_use]
    pub fn reconnect(self, patience: Duration) -> Self {
        VhostUser { reconnect: Some(patience), ..self }
    }

    /// How many queues, or pairs of queues of a network card.
    #[must_use]
    pub fn queues(self, queues: u16) -> Self {
        VhostUser { queues: Some(queues), ..self }
    }

    /// The largest size of each queue, a power of two.
    #[must_use]
    pub fn queue_size(self, size: u16) -> Self {
        VhostUser { queue_size: Some(size), ..self }
    }

    /// The size of the configuration space in bytes, where it is not the type's.
    #[must_use]
    pub fn config_size(self, size: u16) -> Self {
        VhostUser { config_size: Some(size), ..self }
    }

    /// What a file system is mounted by.
    #[must_use]
    pub fn tag(self, tag: impl Into<String>) -> Self {
        VhostUser { tag: Some(tag.into()), ..self }
    }

    /// The MTU that a network card shows.
    #[must_use]
    pub fn mtu(self, mtu: u16) -> Self {
        VhostUser { mtu: Some(mtu), ..self }
    }

    /// The address that a network card shows.
    #[must_use]
    pub fn mac(self, mac: [u8; 6]) -> Self {
        VhostUser { mac: Some(mac), ..self }
    }

    /// Features to negotiate or not, as names with a sign: `-event_idx+mq`.
    #[must_use]
    pub fn features(self, changes: impl Into<String>) -> Self {
        VhostUser { features: changes.into(), ..self }
    }

    /// What the driver's addresses are, when they are not simply guest addresses.
    #[must_use]
    pub fn iommu(self, iommu: Iommu) -> Self {
        VhostUser { iommu: Some(iommu), ..self }
    }

    /// Where a GPU's backend draws.
    #[must_use]
    pub fn display(self, display: Display) -> Self {
        VhostUser { display: Some(display), ..self }
    }

    /// What is asked of the backend.
    ///
    /// # Errors
    /// When the type is unknown, a value is out of its range or not for this type, or the values contradict each other.
    pub fn order(&self) -> Result<Order, Error> {
        let kind = &self.kind;
        let cannot = |what: String| Error::usage(format!("a {kind} device cannot use {what}"));
        let mut device_type = parse_device_type(kind)?;
        if let Some(size) = self.config_size {
            device_type = device_type
                .with_config_size(size)
                .map_err(|error| cannot(format!("config-size={size}")).because(error))?;
        }
        if let Some(tag) = &self.tag {
            device_type =
                device_type.with_tag(tag).map_err(|error| cannot(format!("tag={tag}")).because(error))?;
        }
        if let Some(mtu) = self.mtu {
            device_type =
                device_type.with_mtu(mtu).map_err(|error| cannot(format!("mtu={mtu}")).because(error))?;
        }
        if let Some(mac) = self.mac {
            let text = mac.map(|byte| format!("{byte:02x}")).join(":");
            device_type =
                device_type.with_mac(mac).map_err(|error| cannot(format!("mac={text}")).because(error))?;
        }
        let wishes = Wishes { queues: self.queues, queue_size: self.queue_size };
        wishes
            .validate()
            .map_err(|error| Error::usage(format!("cannot make this {kind} device")).because(error))?;
        let mut order = Order::new(device_type, wishes, &self.features).map_err(|error| {
            cannot(format!("features={}", self.features))
                .because(error)
                .hint("write names with a sign, for example features=-event_idx+mq")
        })?;
        if let Some(display) = &self.display {
            if kind != "gpu" {
                return Err(cannot(format!("gpu-socket={display}"))
                    .because(format!("a {kind} device draws nothing, only gpu does")));
            }
            order = order.drawing_on(display.clone());
        }
        if !matches!(self.socket, Socket::Path(_)) && (self.role == Role::Server || self.reconnect.is_some())
        {
            return Err(Error::usage(format!("a {kind} device cannot find a backend again by a descriptor"))
                .hint("server=on and reconnect= need socket=PATH"));
        }
        Ok(order)
    }
}

/// `blk`, `net`, … or `generic:DEVICE_ID`.
pub(crate) fn parse_device_type(name: &str) -> Result<DeviceType, Error> {
    let known = match name.strip_prefix("generic:") {
        Some(id) => id.parse::<u16>().ok().filter(|id| *id > 0).map(DeviceType::generic),
        None => DeviceType::named(name),
    };
    known.ok_or_else(|| {
        Error::usage(format!("there is no virtio device type `{name}`"))
            .hint(format!("the types are {} and generic:DEVICE_ID", DeviceType::names().join(" ")))
    })
}

/// One PCI device that a vfio-user server serves.
#[derive(Debug)]
#[expect(missing_docs, reason = "each field has a builder method of the same name, which says what it is")]
pub struct VfioUser {
    pub socket: Socket,
    pub id: Option<String>,
    pub deadline: Duration,
    pub wishes: FunctionWishes,
}

impl VfioUser {
    /// The device at `socket`, everything else by default.
    pub fn new(socket: impl Into<Socket>) -> Self {
        VfioUser {
            socket: socket.into(),
            id: None,
            deadline: DEFAULT_DEADLINE,
            wishes: FunctionWishes::default(),
        }
    }

    /// Its name in messages and statistics; `vfio-user` and a number when absent.
    #[must_use]
    pub fn id(self, id: impl Into<String>) -> Self {
        VfioUser { id: Some(id.into()), ..self }
    }

    /// How long the server may take over one request.
    #[must_use]
    pub fn deadline(self, deadline: Duration) -> Self {
        VfioUser { deadline, ..self }
    }

    /// Whether a write to a BAR waits for the server; by default it does where memory of the BAR is mapped into the
    /// guest, and with old libvfio-user.
    #[must_use]
    pub fn writes(mut self, writes: Writes) -> Self {
        self.wishes.writes = Some(writes);
        self
    }
}
