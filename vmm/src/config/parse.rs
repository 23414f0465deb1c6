//! Parsers for the values of options: sizes, times, and lists `VALUE,key=value,…`.
//!
//! A value consists of bytes, because a path does. Every value except a path must be UTF-8. A comma inside a
//! value is written twice, as in QEMU: `blk,socket=/run/a,,b` has the path `/run/a,b`.

use std::ffi::{OsStr, OsString};
use std::ops::RangeInclusive;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use arch::ram::Hugepages;
use devices::pci::vfio_user::server::Writes;
use devices::pci::vfio_user::survey::Reset;
use devices::virtio::backend::spec::Display;
use devices::virtio::ring::address::Iommu;

use transport::peer::socket::Admission;

use super::devices::{Role, Socket, Transport, VfioUser, VhostUser, check_socket_path};
use super::{Memory, Serial};
use crate::error::Error;
use crate::host::descriptors;

/// RAM has a multiple of this size, because some backends ignore regions that are not multiples of 2 MiB.
const MEMORY_STEP: u64 = 2 << 20;
const DEADLINES: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(3600);
const PATIENCE: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(31_536_000);

/// A comma-separated list: one value without a key, then `key=value` pairs. The pairs are taken out one by
/// one.
#[derive(Debug)]
struct KeyValues {
    option: &'static str,
    pairs: Vec<(String, OsString)>,
    /// Every key that was asked for. Any other key is unknown.
    known: Vec<&'static str>,
}

impl KeyValues {
    /// Splits `text` into its first value and its pairs. `option` is named in errors.
    ///
    /// # Errors
    /// When an item after the first has no `=`.
    fn split(option: &'static str, text: &OsStr) -> Result<(Option<OsString>, Self), Error> {
        let mut first = None;
        let mut pairs = Vec::new();
        for (index, item) in items(text.as_bytes()).into_iter().enumerate() {
            match item.iter().position(|byte| *byte == b'=') {
                Some(equals) => {
                    let (key, value) = item.split_at(equals);
                    let value = value.get(1..).unwrap_or_default().to_vec();
                    pairs.push((String::from_utf8_lossy(key).into_owned(), OsString::from_vec(value)));
                }
                None if index == 0 => first = Some(OsString::from_vec(item)),
                None => {
                    let item = String::from_utf8_lossy(&item);
                    let what =
                        format!("{option} cannot use `{item}`: only its first item stands without a key");
                    return Err(Error::usage(what).hint("write KEY=VALUE, and a comma inside a value twice"));
                }
            }
        }
        Ok((first, KeyValues { option, pairs, known: Vec::new() }))
    }

    /// Refuses a pair that is left: its key is unknown or was given twice.
    fn end(self) -> Result<(), Error> {
        let Self { option, pairs, known } = self;
        match pairs.first() {
            None => Ok(()),
            Some((key, _)) if known.contains(&key.as_str()) => {
                Err(Error::usage(format!("{option} got `{key}` twice")))
            }
            Some((key, _)) => Err(Error::usage(format!("{option} has no key `{key}`"))
                .hint(format!("its keys are {}", known.join(", ")))),
        }
    }

    fn cannot(&self, key: &str, value: &OsStr) -> Error {
        Error::usage(format!("{} cannot use {key}={}", self.option, value.display()))
    }

    /// Takes the value of `key`.
    fn bytes(&mut self, key: &'static str) -> Option<OsString> {
        self.known.push(key);
        let index = self.pairs.iter().position(|(seen, _)| *seen == key)?;
        Some(self.pairs.remove(index).1)
    }

    /// Takes the value of `key`, which must be UTF-8.
    fn text(&mut self, key: &'static str) -> Result<Option<String>, Error> {
        let text = self.bytes(key).map(OsString::into_string).transpose();
        text.map_err(|value| self.cannot(key, &value).because("it is not valid UTF-8"))
    }

    /// Takes the value of `key` and parses it. `hint` is the advice for a value that `parse` refuses.
    fn parsed<T>(
        &mut self,
        key: &'static str,
        hint: impl Into<String>,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(text) = self.text(key)? else { return Ok(None) };
        match parse(&text) {
            Some(value) => Ok(Some(value)),
            None => Err(self.cannot(key, OsStr::new(&text)).hint(hint)),
        }
    }

    fn number<T: FromStr + PartialOrd + std::fmt::Display>(
        &mut self,
        key: &'static str,
        range: RangeInclusive<T>,
    ) -> Result<Option<T>, Error> {
        let hint = format!("{key} is a whole number from {} to {}", range.start(), range.end());
        self.parsed(key, hint, |text| whole(text).filter(|number| range.contains(number)))
    }

    fn switch(&mut self, key: &'static str) -> Result<Option<bool>, Error> {
        let hint = format!("write {key}=on or {key}=off");
        self.parsed(key, hint, |text| match text {
            "on" => Some(true),
            "off" => Some(false),
            _ => None,
        })
    }

    /// Takes a time: a whole number in `unit`, or a whole number followed by `ms` or `s`.
    fn time(
        &mut self,
        key: &'static str,
        unit: &str,
        range: RangeInclusive<Duration>,
    ) -> Result<Option<Duration>, Error> {
        let hint = format!(
            "{key} is a whole number of {unit}, or a time such as 500ms or 2s, from {:?} to {:?}",
            range.start(),
            range.end()
        );
        self.parsed(key, hint, |text| {
            let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
            let number = whole(digits)?;
            let time = match text.get(digits.len()..) {
                Some("") if unit == "ms" => Duration::from_millis(number),
                Some("ms") => Duration::from_millis(number),
                Some("" | "s") => Duration::from_secs(number),
                _ => return None,
            };
            range.contains(&time).then_some(time)
        })
    }

    fn socket(&mut self, device: &str, example: &str) -> Result<Socket, Error> {
        match self.bytes("socket").filter(|path| !path.is_empty()) {
            Some(path) => Socket::parse(path),
            None => Err(Error::usage(format!("{device} needs a socket"))
                .hint(format!("for example {} {example}", self.option))),
        }
    }

    /// Takes the keys that say who may connect: `mode=`, for a socket on which we listen, and `allow-user=`.
    fn admission(&mut self, listens: bool) -> Result<Admission, Error> {
        let octal = |text: &str| u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777);
        let mode = match listens {
            true => self.parsed("mode", "mode is three octal digits, such as 660", octal)?,
            false => None,
        };
        let user = self.parsed("allow-user", "write a user's name as in /etc/passwd, or its number", user)?;
        Ok(Admission { mode, user })
    }

    /// Takes the name of a device.
    fn id(&mut self) -> Result<Option<String>, Error> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let hint = "an id has 1 to 64 letters, digits, '-', '_' or '.'";
        self.parsed("id", hint, |id| {
            ((1..=64).contains(&id.len()) && id.chars().all(plain)).then(|| id.to_owned())
        })
    }
}

/// Splits a list at single commas. Two commas stand for one comma of the value.
fn items(text: &[u8]) -> Vec<Vec<u8>> {
    let (mut items, mut item) = (Vec::new(), Vec::new());
    let mut bytes = text.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte != b',' || bytes.next_if_eq(&b',').is_some() {
            item.push(byte);
        } else {
            items.push(std::mem::take(&mut item));
        }
    }
    items.push(item);
    items
}

/// Parses a size: `512M`, `2G`, `2GiB`, `1048576`. The suffixes K, M, G and T are binary.
fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text.get(digits.len()..)? {
        "" => 0,
        "K" | "k" | "KiB" => 10,
        "M" | "m" | "MiB" => 20,
        "G" | "g" | "GiB" => 30,
        "T" | "t" | "TiB" => 40,
        _ => return None,
    };
    whole::<u64>(digits)?.checked_mul(1 << shift)
}

/// Parses a number that consists of digits only.
fn whole<T: FromStr>(digits: &str) -> Option<T> {
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?
}

/// Gives the number of a user. The user is named by number or by a name in `/etc/passwd`.
fn user(text: &str) -> Option<u32> {
    let named = || {
        let users = std::fs::read_to_string("/etc/passwd").ok()?;
        let mut fields = users.lines().map(|line| line.split(':'));
        fields.find_map(|mut fields| if fields.next() == Some(text) { whole(fields.nth(1)?) } else { None })
    };
    whole(text).or_else(named)
}

/// Parses a MAC address: `02:00:00:00:00:01`.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let of_two = |part: &str| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
    let number = |part: &str| u8::from_str_radix(part, 16).ok().filter(|_| of_two(part));
    let numbers: Option<Vec<u8>> = text.split(':').map(number).collect();
    numbers?.try_into().ok()
}

/// `--memory SIZE[,hugepages=2M|1G][,dump=on]`.
///
/// # Errors
/// When the size is no size, too small, or no multiple of 2 MiB (of the huge page size, with one).
pub fn parse_memory(text: &str) -> Result<Memory, Error> {
    let (size, mut keys) = KeyValues::split("--memory", OsStr::new(text))?;
    let Some(size) = size.and_then(|size| size.into_string().ok()) else {
        return Err(Error::usage("--memory needs a size first").hint("write a size such as 512M or 2G"));
    };
    let bytes = parse_size(&size).ok_or_else(|| {
        let refused = Error::usage(format!("--memory cannot use the size `{size}`"));
        match size.strip_suffix('B').filter(|meant| parse_size(meant).is_some()) {
            Some(meant) => refused.hint(format!("write a size such as {meant}, in powers of 1024")),
            None => refused.hint("write a size such as 512M or 2G"),
        }
    })?;
    let hugepages = keys.parsed("hugepages", "the sizes are 2M and 1G", |size| match size {
        "2M" => Some(Hugepages::Size2M),
        "1G" => Some(Hugepages::Size1G),
        _ => None,
    })?;
    let dump = keys.switch("dump")?.unwrap_or(false);
    keys.end()?;
    let (step, name) = match hugepages {
        Some(Hugepages::Size1G) => (1 << 30, "1 GiB"),
        _ => (MEMORY_STEP, "2 MiB"),
    };
    if bytes == 0 || !bytes.is_multiple_of(step) {
        let nearest = (bytes / step * step).max(arch::layout::RAM_MIN).max(step) >> 20;
        let hint = match size.parse::<u64>() {
            Ok(number) if (1..=1 << 16).contains(&number) => {
                format!("a number without a unit is bytes: is {number}M meant?")
            }
            _ => format!("try {nearest}M"),
        };
        return Err(Error::usage(format!("--memory {size} is not a multiple of {name}")).hint(hint));
    }
    if bytes < arch::layout::RAM_MIN {
        return Err(Error::usage(format!("--memory {size} is too little for a machine"))
            .hint(format!("give at least {}M", arch::layout::RAM_MIN >> 20)));
    }
    Ok(Memory { size: bytes, hugepages: hugepages.unwrap_or_default(), dump })
}

/// `--serial stdio|null|file=PATH|socket=PATH[,mode=OCTAL][,allow-user=USER]`.
///
/// # Errors
/// When it is none of these.
pub fn parse_serial(text: impl AsRef<OsStr>) -> Result<Serial, Error> {
    let text = text.as_ref();
    let path = |key: &str| {
        let path = text.as_bytes().strip_prefix(key.as_bytes()).filter(|path| !path.is_empty());
        path.map(|path| PathBuf::from(OsStr::from_bytes(path)))
    };
    if text == "stdio" {
        Ok(Serial::Stdio)
    } else if text == "null" {
        Ok(Serial::Null)
    } else if let Some(path) = path("file=") {
        Ok(Serial::File(path))
    } else if text.as_bytes().starts_with(b"socket=") {
        let (_, mut keys) = KeyValues::split("--serial", text)?;
        let path = PathBuf::from(keys.bytes("socket").unwrap_or_default());
        check_socket_path(&path)?;
        let admission = keys.admission(true)?;
        keys.end()?;
        Ok(Serial::Socket(path, admission))
    } else {
        Err(Error::usage(format!("--serial cannot use `{}`", text.display()))
            .hint("write stdio, null, file=PATH or socket=PATH"))
    }
}

/// `--vhost-user TYPE,socket=PATH[,key=value…]`.
///
/// # Errors
/// When the type or a key is unknown, a value out of range, or the socket is missing.
pub fn parse_vhost_user(text: impl AsRef<OsStr>) -> Result<VhostUser, Error> {
    let option = "--vhost-user";
    let (kind, mut keys) = KeyValues::split(option, text.as_ref())?;
    let Some(kind) = kind.filter(|kind| !kind.is_empty()) else {
        return Err(Error::usage(format!("{option} needs a device type first"))
            .hint("for example --vhost-user blk,socket=/run/blk.sock"));
    };
    let kind = kind.to_string_lossy();
    let mut device = VhostUser::new(
        kind.as_ref(),
        keys.socket(&format!("{option} {kind}"), &format!("{kind},socket=/run/{kind}.sock"))?,
    );
    device.id = keys.id()?;
    device.queues = keys.number("queues", 1..=256)?;
    device.queue_size = keys.number("queue-size", 1..=32768)?;
    device.config_size = keys.number("config-size", 0..=256)?;
    device.tag = keys.text("tag")?;
    device.mtu = keys.number("mtu", 68..=u16::MAX)?;
    device.mac = keys.parsed("mac", "an address has six numbers: mac=02:00:00:00:00:01", parse_mac)?;
    device.features = keys.text("features")?.unwrap_or_default();
    device.reconnect = keys.time("reconnect", "seconds", PATIENCE)?;
    device.deadline = keys.time("deadline", "ms", DEADLINES)?.unwrap_or(device.deadline);
    device.transport = keys
        .parsed("transport", "write transport=mmio or transport=pci", |text| match text {
            "mmio" => Some(Transport::Mmio),
            "pci" => Some(Transport::Pci),
            _ => None,
        })?
        .unwrap_or_default();
    if keys.switch("server")? == Some(true) {
        device.role = Role::Server;
    }
    device.admission = keys.admission(device.role == Role::Server)?;
    let iommu = |text: &str| if text == "off" { Some(None) } else { text.parse::<Iommu>().ok().map(Some) };
    device.iommu = keys.parsed("iommu", "write iommu=identity, or leave it out", iommu)?.flatten();
    if let Some(socket) = keys.bytes("gpu-socket") {
        device.display = Some(match Socket::parse(socket)? {
            Socket::Path(path) => Display::Path(path),
            Socket::Inherited(stream, _) | Socket::Stream(stream) => Display::Open(Arc::new(stream.into())),
        });
    }
    keys.end()?;
    device.order()?;
    Ok(device)
}

/// `--vfio-user socket=PATH[,key=value…]`.
///
/// # Errors
/// When a key is unknown, a value out of range, or the socket is missing.
pub fn parse_vfio_user(text: impl AsRef<OsStr>) -> Result<VfioUser, Error> {
    let option = "--vfio-user";
    let (first, mut keys) = KeyValues::split(option, text.as_ref())?;
    let example = "socket=/run/nvme.sock";
    if let Some(word) = first.filter(|word| !word.is_empty()) {
        return Err(Error::usage(format!("{option} cannot use `{}`: everything has a key", word.display()))
            .hint(format!("for example {option} {example}")));
    }
    let mut device = VfioUser::new(keys.socket(option, example)?);
    device.id = keys.id()?;
    device.deadline = keys.time("deadline", "ms", DEADLINES)?.unwrap_or(device.deadline);
    device.admission = keys.admission(false)?;
    let posted = keys.switch("posted-writes")?;
    device.wishes.reset = keys.switch("reset")?.filter(|reset| !reset).map(|_| Reset::Unused);
    device.wishes.writes = posted.map(|posted| if posted { Writes::Posted } else { Writes::Answered });
    keys.end()?;
    Ok(device)
}

impl Socket {
    /// `PATH`, or `fd=N` for an inherited descriptor.
    fn parse(text: OsString) -> Result<Self, Error> {
        let Some(number) = text.as_bytes().strip_prefix(b"fd=") else {
            check_socket_path(text.as_ref())?;
            return Ok(Socket::Path(PathBuf::from(text)));
        };
        let number = String::from_utf8_lossy(number);
        match number.parse::<i32>() {
            Ok(fd) if fd > 2 => match descriptors::inherited_stream(fd) {
                Ok(stream) => Ok(Socket::Inherited(stream, fd)),
                Err(error) => Err(Error::usage(format!("cannot use descriptor {fd} as a socket"))
                    .because(error)
                    .hint("the program that starts outboard must leave one end of a socket pair open under that number")),
            },
            _ => Err(Error::usage(format!("`{number}` is no inherited descriptor"))
                .hint("write socket=fd=N with the number of an open descriptor above 2")),
        }
    }
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
