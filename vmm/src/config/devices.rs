//! The devices of a machine, as data with builders. The command line's parser uses the same builders.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use devices::pci::vfio_user::Wishes as FunctionWishes;
use devices::virtio::backend::spec::{Display, Order};
use devices::virtio::ring::address::Iommu;
use devices::virtio::types::model::Wishes;
use devices::virtio::types::table::DeviceType;

use transport::peer::socket::Admission;

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

/// A device as data, and its builder: each line is a field, what its method takes, the default, and what is
/// stored.
macro_rules! device {
    ($(#[$about:meta])* $device:ident { $($(#[$doc:meta])* $field:ident($arg:ty): $type:ty = $default:expr => $stored:expr;)* }) => {
        $(#[$about])*
        #[derive(Debug)]
        pub struct $device {
            /// Where its peer is.
            pub socket: Socket,
            $($(#[$doc])* pub $field: $type,)*
        }

        impl $device {
            fn at(socket: Socket) -> Self {
                Self { socket, $($field: $default),* }
            }

            $(
                $(#[$doc])*
                #[must_use]
                pub fn $field(mut self, $field: $arg) -> Self {
                    self.$field = $stored;
                    self
                }
            )*
        }
    };
}

device! {
    /// One virtio device whose queues a vhost-user backend serves.
    VhostUser {
        /// The name of its type: `blk`, `net`, … or `generic:ID`. An unknown one is refused when the machine
        /// is built.
        kind(impl Into<String>): String = String::new() => kind.into();
        /// Its name in messages and statistics; the type and a number when absent.
        id(impl Into<String>): Option<String> = None => Some(id.into());
        /// How the guest sees it.
        transport(Transport): Transport = Transport::Mmio => transport;
        /// Who connects to whom.
        role(Role): Role = Role::Client => role;
        /// Who else may be at the other end of a socket on which we listen, or of an abstract name.
        admission(Admission): Admission = Admission::default() => admission;
        /// How long the backend may take over one request.
        deadline(Duration): Duration = DEFAULT_DEADLINE => deadline;
        /// How long a backend that is not there, or is lost, is waited for; zero: for ever. Absent: not at
        /// all.
        reconnect(Duration): Option<Duration> = None => Some(reconnect);
        /// How many queues, or pairs of queues of a network card.
        queues(u16): Option<u16> = None => Some(queues);
        /// The largest size of each queue, a power of two.
        queue_size(u16): Option<u16> = None => Some(queue_size);
        /// The size of the configuration space in bytes, where it is not the type's.
        config_size(u16): Option<u16> = None => Some(config_size);
        /// What a file system is mounted by.
        tag(impl Into<String>): Option<String> = None => Some(tag.into());
        /// The MTU that a network card shows.
        mtu(u16): Option<u16> = None => Some(mtu);
        /// The address that a network card shows.
        mac([u8; 6]): Option<[u8; 6]> = None => Some(mac);
        /// Features to negotiate or not, as names with a sign: `-event_idx+mq`.
        features(impl Into<String>): String = String::new() => features.into();
        /// What the driver's addresses are, when they are not simply guest addresses.
        iommu(Iommu): Option<Iommu> = None => Some(iommu);
        /// Where a GPU's backend draws.
        display(Display): Option<Display> = None => Some(display);
    }
}

device! {
    /// One PCI device that a vfio-user server serves.
    VfioUser {
        /// Its name in messages and statistics; `vfio-user` and a number when absent.
        id(impl Into<String>): Option<String> = None => Some(id.into());
        /// Who else may be at the other end of an abstract name.
        admission(Admission): Admission = Admission::default() => admission;
        /// How long the server may take over one request.
        deadline(Duration): Duration = DEFAULT_DEADLINE => deadline;
        /// How its BARs are written, and the like.
        wishes(FunctionWishes): FunctionWishes = FunctionWishes::default() => wishes;
    }
}

impl VfioUser {
    /// The device at `socket`, everything else by default.
    pub fn new(socket: impl Into<Socket>) -> Self {
        Self::at(socket.into())
    }
}

macro_rules! device_types {
    ($($name:ident)*) => {
        $(
            #[doc = concat!("A `", stringify!($name), "` device, everything else by default.")]
            pub fn $name(socket: impl Into<Socket>) -> Self {
                Self::new(stringify!($name), socket)
            }
        )*
        #[cfg(test)]
        pub(super) const CONSTRUCTORS: &[&str] = &[$(stringify!($name)),*];
    };
}

impl VhostUser {
    device_types! { net blk console rng scsi gpu rtc input vsock crypto sound fs scmi i2c can gpio spi media }

    /// A device of the type called `kind`, everything else by default.
    pub fn new(kind: impl Into<String>, socket: impl Into<Socket>) -> Self {
        Self::at(socket.into()).kind(kind)
    }

    /// The guest sees a PCI function in place of a virtio-mmio device.
    #[must_use]
    pub fn pci(self) -> Self {
        self.transport(Transport::Pci)
    }

    /// We listen on the path, and the backend connects.
    #[must_use]
    pub fn server(self) -> Self {
        self.role(Role::Server)
    }

    /// What is asked of the backend.
    ///
    /// # Errors
    /// When the type is unknown, a value is out of its range or not for this type, or the values contradict
    /// each other.
    pub fn order(&self) -> Result<Order, Error> {
        let kind = &self.kind;
        let cannot = |what: String| Error::usage(format!("a {kind} device cannot use {what}"));
        let refused =
            |key: &str, value: &dyn fmt::Display, why| cannot(format!("{key}={value}")).because(why);
        let mut device_type = parse_device_type(kind)?;
        if let Some(size) = self.config_size {
            device_type =
                device_type.with_config_size(size).map_err(|why| refused("config-size", &size, why))?;
        }
        if let Some(tag) = &self.tag {
            device_type = device_type.with_tag(tag).map_err(|why| refused("tag", tag, why))?;
        }
        if let Some(mtu) = self.mtu {
            device_type = device_type.with_mtu(mtu).map_err(|why| refused("mtu", &mtu, why))?;
        }
        if let Some(mac) = self.mac {
            let text = mac.map(|byte| format!("{byte:02x}")).join(":");
            device_type = device_type.with_mac(mac).map_err(|why| refused("mac", &text, why))?;
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
