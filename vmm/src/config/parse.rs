//! The values of the options: sizes, and `VALUE,key=value,…` lists.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arch::ram::Hugepages;
use devices::virtio::backend::spec::{Display, Order};
use devices::virtio::ring::address::Iommu;
use devices::virtio::types::table::{DeviceType, Wishes};

use super::{DEFAULT_DEADLINE, Memory, Role, Serial, Socket, Transport, VhostUser};
use crate::error::Error;
use crate::host::descriptors;

/// RAM comes in steps of this size, because some backends ignore regions that are not 2 MiB multiples.
const MEMORY_STEP: u64 = 2 << 20;

/// A comma-separated list: values without a key first, then `key=value` pairs.
///
/// Keys are taken one by one; [`KeyValues::finish`] refuses those that nobody took.
#[derive(Debug)]
pub(super) struct KeyValues<'a> {
    option: &'a str,
    known: &'static [&'static str],
    pairs: Vec<(&'a str, &'a str)>,
}

impl<'a> KeyValues<'a> {
    /// Splits `text` into its first value and its pairs. `option` is named in errors.
    ///
    /// # Errors
    /// When an item after the first has no `=`, or a key is given twice or is unknown.
    pub(super) fn split(
        option: &'a str,
        text: &'a str,
        known: &'static [&'static str],
    ) -> Result<(Option<&'a str>, Self), Error> {
        let mut first = None;
        let mut pairs: Vec<(&str, &str)> = Vec::new();
        for (index, item) in text.split(',').enumerate() {
            match item.split_once('=') {
                Some((key, value)) => {
                    if !known.contains(&key) {
                        return Err(Error::usage(format!("{option} has no key `{key}`"))
                            .hint(format!("its keys are {}", known.join(", "))));
                    }
                    if pairs.iter().any(|(seen, _)| *seen == key) {
                        return Err(Error::usage(format!("{option} got `{key}` twice")));
                    }
                    pairs.push((key, value));
                }
                None if index == 0 => first = Some(item),
                None => {
                    return Err(Error::usage(format!(
                        "{option} cannot use `{item}`: only its first item stands without a key"
                    ))
                    .hint(format!("write KEY=VALUE; its keys are {}", known.join(", "))));
                }
            }
        }
        Ok((first, KeyValues { option, known, pairs }))
    }

    /// Takes the value of `key`.
    pub(super) fn take(&mut self, key: &str) -> Option<&'a str> {
        debug_assert!(self.known.contains(&key));
        let index = self.pairs.iter().position(|(seen, _)| *seen == key)?;
        Some(self.pairs.swap_remove(index).1)
    }

    /// Takes the value of `key` as a number within `range`.
    ///
    /// # Errors
    /// When it is no number or outside the range.
    pub(super) fn take_number(
        &mut self,
        key: &str,
        range: std::ops::RangeInclusive<u64>,
    ) -> Result<Option<u64>, Error> {
        let Some(text) = self.take(key) else { return Ok(None) };
        match text.parse::<u64>() {
            Ok(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(Error::usage(format!("{} cannot use {key}={text}", self.option)).hint(format!(
                "{key} is a whole number from {} to {}",
                range.start(),
                range.end()
            ))),
        }
    }
}

/// `512M`, `2G`, `1048576`, with binary suffixes K, M, G, T.
fn parse_size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.char_indices().last()? {
        (at, 'K' | 'k') => (text.get(..at)?, 10),
        (at, 'M' | 'm') => (text.get(..at)?, 20),
        (at, 'G' | 'g') => (text.get(..at)?, 30),
        (at, 'T' | 't') => (text.get(..at)?, 40),
        _ => (text, 0),
    };
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    number.checked_mul(1 << shift)
}

/// `02:00:00:00:00:01`.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let of_two = |part: &str| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
    let number = |part: &str| u8::from_str_radix(part, 16).ok().filter(|_| of_two(part));
    let numbers: Option<Vec<u8>> = text.split(':').map(number).collect();
    numbers?.try_into().ok()
}

/// `--memory SIZE[,hugepages=2M|1G]`.
///
/// # Errors
/// When the size is no size, too small, or no multiple of 2 MiB (of the huge page size, with one).
pub fn parse_memory(text: &str) -> Result<Memory, Error> {
    let (size, mut keys) = KeyValues::split("--memory", text, &["hugepages"])?;
    let bad = |what: String| Error::usage(what).hint("write a size such as 512M or 2G");
    let Some(size) = size else { return Err(bad("--memory needs a size first".to_owned())) };
    let bytes = parse_size(size).ok_or_else(|| bad(format!("--memory cannot use the size `{size}`")))?;
    let (hugepages, step, name) = match keys.take("hugepages") {
        None => (Hugepages::Off, MEMORY_STEP, "2 MiB"),
        Some("2M") => (Hugepages::Size2M, MEMORY_STEP, "2 MiB"),
        Some("1G") => (Hugepages::Size1G, 1 << 30, "1 GiB"),
        Some(other) => {
            return Err(Error::usage(format!("--memory cannot use hugepages={other}"))
                .hint("the sizes are 2M and 1G"));
        }
    };
    if bytes == 0 || !bytes.is_multiple_of(step) {
        let below = (bytes / step).max(1) * step;
        return Err(Error::usage(format!("--memory {size} is not a multiple of {name}"))
            .hint(format!("try {}M", below >> 20)));
    }
    if bytes < arch::layout::RAM_MIN {
        return Err(Error::usage(format!("--memory {size} is too little for a machine"))
            .hint(format!("give at least {}M", arch::layout::RAM_MIN >> 20)));
    }
    Ok(Memory { size: bytes, hugepages })
}

/// `--serial stdio|null|file=PATH|socket=PATH`.
///
/// # Errors
/// When it is none of these.
pub fn parse_serial(text: &str) -> Result<Serial, Error> {
    match text.split_once('=') {
        None if text == "stdio" => Ok(Serial::Stdio),
        None if text == "null" => Ok(Serial::Null),
        Some(("file", path)) if !path.is_empty() => Ok(Serial::File(PathBuf::from(path))),
        Some(("socket", path)) if !path.is_empty() => Ok(Serial::Socket(PathBuf::from(path))),
        _ => Err(Error::usage(format!("--serial cannot use `{text}`"))
            .hint("write stdio, null, file=PATH or socket=PATH")),
    }
}

/// The keys of `--vhost-user`.
pub(super) const VHOST_USER_KEYS: &[&str] = &[
    "socket",
    "id",
    "transport",
    "queues",
    "queue-size",
    "config-size",
    "tag",
    "reconnect",
    "deadline",
    "features",
    "server",
    "iommu",
    "mtu",
    "mac",
    "gpu-socket",
];

/// `--vhost-user TYPE,socket=PATH[,key=value…]`.
///
/// # Errors
/// When the type or a key is unknown, a value out of range, or the socket is missing.
pub fn parse_vhost_user(text: &str) -> Result<VhostUser, Error> {
    let option = "--vhost-user";
    let (kind, mut keys) = KeyValues::split(option, text, VHOST_USER_KEYS)?;
    let Some(name) = kind.filter(|name| !name.is_empty()) else {
        return Err(Error::usage(format!("{option} needs a device type first"))
            .hint("for example --vhost-user blk,socket=/run/blk.sock"));
    };
    let mut device_type = parse_device_type(name)?;
    if let Some(size) = number16(keys.take_number("config-size", 0..=256)?) {
        device_type = device_type.with_config_size(size).map_err(|error| {
            Error::usage(format!("{option} cannot use config-size={size}")).because(error)
        })?;
    }
    if let Some(tag) = keys.take("tag") {
        device_type = device_type
            .with_tag(tag)
            .map_err(|error| Error::usage(format!("{option} cannot use tag={tag}")).because(error))?;
    }

    if let Some(mtu) = number16(keys.take_number("mtu", 68..=65535)?) {
        device_type = device_type
            .with_mtu(mtu)
            .map_err(|error| Error::usage(format!("{option} cannot use mtu={mtu}")).because(error))?;
    }

    if let Some(text) = keys.take("mac") {
        let refused = Error::usage(format!("{option} cannot use mac={text}"));
        device_type = match parse_mac(text).map(|mac| device_type.with_mac(mac)) {
            Some(Ok(with)) => with,
            Some(Err(error)) => return Err(refused.because(error)),
            None => return Err(refused.hint("an address has six numbers: mac=02:00:00:00:00:01")),
        };
    }

    let transport = match keys.take("transport") {
        None | Some("mmio") => Transport::Mmio,
        Some("pci") => Transport::Pci,
        Some(other) => {
            return Err(Error::usage(format!("{option} cannot use transport={other}"))
                .hint("write transport=mmio or transport=pci"));
        }
    };

    let socket = match keys.take("socket") {
        Some(path) if !path.is_empty() => Socket::parse(path)?,
        _ => {
            return Err(Error::usage(format!("{option} {name} needs a socket"))
                .hint(format!("for example --vhost-user {name},socket=/run/{name}.sock")));
        }
    };
    let wishes = Wishes {
        queues: number16(keys.take_number("queues", 1..=256)?),
        queue_size: number16(keys.take_number("queue-size", 1..=32768)?),
    };
    wishes
        .validate()
        .map_err(|error| Error::usage(format!("{option} cannot make this {name} device")).because(error))?;
    let features = keys.take("features").unwrap_or("");
    let mut order = Order::new(device_type, wishes, features).map_err(|error| {
        Error::usage(format!("{option} cannot use features={features}"))
            .because(error)
            .hint("write names with a sign, for example features=-event_idx+mq")
    })?;
    if let Some(text) = keys.take("gpu-socket") {
        if name != "gpu" {
            return Err(Error::usage(format!("{option} cannot use gpu-socket={text}"))
                .because(format!("a {name} device draws nothing, only gpu does")));
        }
        order = order.drawing_on(match Socket::parse(text)? {
            Socket::Path(path) => Display::Path(path),
            Socket::Inherited(stream, _) | Socket::Stream(stream) => Display::Open(Arc::new(stream.into())),
        });
    }
    let role = match keys.take("server") {
        None | Some("off") => Role::Client,
        Some("on") => Role::Server,
        Some(other) => {
            return Err(Error::usage(format!("{option} cannot use server={other}"))
                .hint("write server=on or server=off"));
        }
    };
    let reconnect = keys.take_number("reconnect", 0..=31_536_000)?.map(Duration::from_secs);
    let has_path = matches!(socket, Socket::Path(_));
    if !has_path && (role == Role::Server || reconnect.is_some()) {
        return Err(Error::usage(format!("{option} cannot find a backend again by a descriptor"))
            .hint("server=on and reconnect= need socket=PATH"));
    }
    let iommu = match keys.take("iommu") {
        None | Some("off") => None,
        Some(word) => Some(word.parse::<Iommu>().map_err(|error| {
            Error::usage(format!("{option} cannot use iommu={word}"))
                .because(error)
                .hint("write iommu=identity, or leave it out")
        })?),
    };
    let mut device =
        VhostUser { order, transport, socket, id: None, deadline: DEFAULT_DEADLINE, reconnect, role, iommu };
    device.id = id(option, &mut keys)?;
    if let Some(deadline) = keys.take_number("deadline", 1..=3_600_000)? {
        device.deadline = Duration::from_millis(deadline);
    }
    Ok(device)
}

/// A device's name.
pub(super) fn id(option: &str, keys: &mut KeyValues<'_>) -> Result<Option<String>, Error> {
    let Some(id) = keys.take("id") else { return Ok(None) };
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if id.is_empty() || id.len() > 64 || !id.chars().all(plain) {
        return Err(Error::usage(format!("{option} cannot use id={id}"))
            .hint("an id has 1 to 64 letters, digits, '-', '_' or '.'"));
    }
    Ok(Some(id.to_owned()))
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

impl Socket {
    /// `PATH`, or `fd=N` for an inherited descriptor.
    pub(super) fn parse(text: &str) -> Result<Self, Error> {
        match text.strip_prefix("fd=") {
            None => Ok(Socket::Path(PathBuf::from(text))),
            Some(number) => match number.parse::<i32>() {
                Ok(fd) if fd > 2 => match descriptors::inherited_stream(fd) {
                    Ok(stream) => Ok(Socket::Inherited(stream, fd)),
                    Err(error) => Err(Error::usage(format!("cannot use descriptor {fd} as a socket"))
                        .because(error)
                        .hint("whoever starts outboard must leave one end of a socket pair open under that number")),
                },
                _ => Err(Error::usage(format!("`{number}` is no inherited descriptor"))
                    .hint("write socket=fd=N with the number of an open descriptor above 2")),
            },
        }
    }
}

/// A number that its range already keeps within 16 bits.
fn number16(number: Option<u64>) -> Option<u16> {
    number.and_then(|number| u16::try_from(number).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_take_binary_suffixes_and_nothing_else() {
        assert_eq!(parse_size("512M"), Some(512 << 20));
        assert_eq!(parse_size("2g"), Some(2 << 30));
        assert_eq!(parse_size("4096"), Some(4096));
        for bad in ["", "M", "-1", "1.5G", "0x10", "99999999999999999999", "18446744073709551615K", "+3"] {
            assert_eq!(parse_size(bad), None, "{bad}");
        }
    }

    #[test]
    fn odd_memory_size_is_refused_with_the_nearest_one() {
        let error = parse_memory("129M").unwrap_err();
        let mut out = Vec::new();
        error.report(&mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains("129M is not a multiple of 2 MiB") && text.contains("try 128M"), "{text}");
    }

    #[test]
    fn vhost_user_takes_every_key() {
        let device = parse_vhost_user(
            "blk,socket=/s,id=disk0,transport=pci,queues=2,queue-size=128,deadline=500,features=-event_idx",
        )
        .unwrap();
        assert_eq!(device.id.as_deref(), Some("disk0"));
        let wishes = device.order.wishes;
        assert_eq!((wishes.queues, wishes.queue_size), (Some(2), Some(128)));
        assert_eq!(device.deadline, Duration::from_millis(500));
        assert_eq!(device.transport, Transport::Pci);
    }

    #[test]
    fn vhost_user_refuses_what_it_cannot_do() {
        for (text, part) in [
            ("blk", "needs a socket"),
            ("socket=/s", "needs a device type"),
            ("floppy,socket=/s", "no virtio device type `floppy`"),
            ("blk,socket=/s,colour=red", "has no key `colour`"),
            ("blk,socket=/s,id=a,id=b", "got `id` twice"),
            ("blk,socket=/s,queue-size=100", "cannot make this blk device"),
            ("blk,socket=/s,queues=0", "queues=0"),
            ("blk,socket=/s,transport=isa", "transport=isa"),
            ("blk,socket=/s,server=maybe", "server=maybe"),
            ("blk,socket=/s,reconnect=soon", "reconnect=soon"),
            ("blk,socket=/s,mtu=1500", "mtu=1500"),
            ("net,socket=/s,mtu=67", "mtu=67"),
            ("blk,socket=/s,mac=02:00:00:00:00:01", "mac=02:00:00:00:00:01"),
            ("net,socket=/s,mac=03:00:00:00:00:01", "mac=03:00:00:00:00:01"),
            ("net,socket=/s,mac=00:00:00:00:00:00", "mac=00:00:00:00:00:00"),
            ("net,socket=/s,mac=2:0:0:0:0:1", "mac=2:0:0:0:0:1"),
            ("net,socket=/s,mac=02:00:00:00:00:+1", "mac=02:00:00:00:00:+1"),
            ("net,socket=/s,mac=02:00:00:00:00:00:01", "mac=02:00:00:00:00:00:01"),
            ("blk,socket=/s,gpu-socket=/d", "gpu-socket=/d"),
            ("blk,socket=/s,iommu=yes", "iommu=yes"),
            ("blk,socket=fd=x", "no inherited descriptor"),
            ("blk,/s", "only its first item"),
            ("blk,socket=/s,features=-nonsense", "features=-nonsense"),
        ] {
            let error = parse_vhost_user(text).unwrap_err();
            assert!(error.to_string().contains(part), "{text}: {error}");
            assert_eq!(error.fault().exit_code(), 2);
        }
    }
}
