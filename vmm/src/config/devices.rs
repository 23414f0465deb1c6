//! The devices of a machine, as data with builders. The parser of the command line uses the same builders.

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

/// The time that a peer may take over one request, unless `deadline=` gives another.
pub const DEFAULT_DEADLINE: Duration = Duration::from_millis(2000);

/// The address of a peer.
#[derive(Debug)]
pub enum Socket {
    /// The path of a unix socket, or `@NAME` for an abstract one.
    Path(PathBuf),
    /// A connected stream that this process inherited, and the number of its descriptor.
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

/// Refuses a path that cannot be the address of a unix socket: `sun_path` has 108 bytes, including a NUL at
/// one end.
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

/// The transport by which the guest sees a virtio device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// A page of registers and an interrupt line.
    #[default]
    Mmio,
    /// A PCI function with MSI-X.
    Pci,
}

/// The side that connects on a [`Socket::Path`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// The backend listens.
    #[default]
    Client,
    /// We listen, and the backend connects.
    Server,
}

/// Defines a device as data with a builder. Each line gives a field, the parameter of its builder method, the
/// field's type and default, and the stored value.
macro_rules! device {
    ($(#[$about:meta])* $device:ident { $($(#[$doc:meta])* $field:ident($arg:ty): $type:ty = $default:expr => $stored:expr;)* }) => {
        $(#[$about])*
        #[derive(Debug)]
        pub struct $device {
            /// The address of its peer.
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
        /// The name of its type: `blk`, `net`, … or `generic:ID`. The build of the machine refuses an unknown
        /// name.
        kind(impl Into<String>): String = String::new() => kind.into();
        /// Its name in messages and statistics. By default the type and a number.
        id(impl Into<String>): Option<String> = None => Some(id.into());
        /// How the guest sees it.
        transport(Transport): Transport = Transport::Mmio => transport;
        /// The side that connects.
        role(Role): Role = Role::Client => role;
        /// The users, beside our own and root, who may be at the other end. It applies to a socket on which
        /// we listen and to an abstract name.
        admission(Admission): Admission = Admission::default() => admission;
        /// The time that the backend may take over one request.
        deadline(Duration): Duration = DEFAULT_DEADLINE => deadline;
        /// The time for which a backend that is absent or lost is searched. Zero is without limit. By default
        /// there is no search.
        reconnect(Duration): Option<Duration> = None => Some(reconnect);
        /// The number of queues; for a network card, the number of queue pairs.
        queues(u16): Option<u16> = None => Some(queues);
        /// The largest size of each queue, a power of two.
        queue_size(u16): Option<u16> = None => Some(queue_size);
        /// The size of the configuration space in bytes, if it differs from the size for the type.
        config_size(u16): Option<u16> = None => Some(config_size);
        /// The tag by which the guest mounts a file system.
        tag(impl Into<String>): Option<String> = None => Some(tag.into());
        /// The MTU that a network card shows.
        mtu(u16): Option<u16> = None => Some(mtu);
        /// The address that a network card shows.
        mac([u8; 6]): Option<[u8; 6]> = None => Some(mac);
        /// Changes to the features to negotiate, as names with a sign: `-event_idx+mq`.
        features(impl Into<String>): String = String::new() => features.into();
        /// The meaning of the driver's addresses, if they are not guest-physical addresses.
        iommu(Iommu): Option<Iommu> = None => Some(iommu);
        /// The display protocol's socket for a GPU's backend.
        display(Display): Option<Display> = None => Some(display);
    }
}

device! {
    /// One PCI device that a vfio-user server serves.
    VfioUser {
        /// Its name in messages and statistics. By default `vfio-user` and a number.
        id(impl Into<String>): Option<String> = None => Some(id.into());
        /// The users, beside our own and root, who may be at the other end of a socket with an abstract name.
        admission(Admission): Admission = Admission::default() => admission;
        /// The time that the server may take over one request.
        deadline(Duration): Duration = DEFAULT_DEADLINE => deadline;
        /// Options of the function, such as the way in which its BARs are written.
        wishes(FunctionWishes): FunctionWishes = FunctionWishes::default() => wishes;
    }
}

impl VfioUser {
    /// A device at `socket`, with the default for every option.
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

    /// A device of the type `kind`, with the default for every option.
    pub fn new(kind: impl Into<String>, socket: impl Into<Socket>) -> Self {
        Self::at(socket.into()).kind(kind)
    }

    /// Makes the device a PCI function instead of a virtio-mmio device.
    #[must_use]
    pub fn pci(self) -> Self {
        self.transport(Transport::Pci)
    }

    /// Makes us listen on the path, so that the backend connects.
    #[must_use]
    pub fn server(self) -> Self {
        self.role(Role::Server)
    }

    /// The properties that the device must have and that its backend is asked for.
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

/// Parses a device type: `blk`, `net`, … or `generic:DEVICE_ID`.
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
