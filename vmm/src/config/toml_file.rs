//! The configuration file of `--config FILE.toml`. It uses the same names as the options of `outboard run`.
//!
//! ```toml
//! kernel = "/boot/vmlinuz"
//! memory = "512M"
//! cpus = 2
//! vhost-user = ["blk,socket=/run/blk.sock,id=disk0", { type = "net", socket = "/run/a,b.sock", queues = 2 }]
//! ```

use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer};

use crate::error::Error;

/// The contents of a configuration file. An unknown name is refused.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct File {
    /// `--kernel`
    pub kernel: Option<PathBuf>,
    /// `--initramfs`
    pub initramfs: Option<PathBuf>,
    /// `--cmdline`
    pub cmdline: Option<String>,
    /// `--memory`
    pub memory: Option<String>,
    /// `--cpus`
    pub cpus: Option<u8>,
    /// `--vhost-user`, one item for each device: the text of the option, or a table of its keys
    #[serde(default, deserialize_with = "devices")]
    pub vhost_user: Vec<String>,
    /// `--vfio-user`, in the same form
    #[serde(default, deserialize_with = "devices")]
    pub vfio_user: Vec<String>,
    /// `--serial`
    pub serial: Option<String>,
    /// `--stats`
    pub stats: Option<PathBuf>,
    /// `--trace`
    pub trace: Option<PathBuf>,
    /// `--no-reboot`
    #[serde(default)]
    pub no_reboot: bool,
    /// `--discovery`
    pub discovery: Option<String>,
}

/// Turns each table into the text that the command line would have. Commas inside its values are written
/// twice.
fn devices<'de, D: Deserializer<'de>>(source: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Device {
        Text(String),
        Keys(toml::Table),
    }
    let value = |value| match value {
        toml::Value::String(text) => text.replace(',', ",,"),
        toml::Value::Boolean(on) => if on { "on" } else { "off" }.to_owned(),
        toml::Value::Integer(number) => number.to_string(),
        // No key takes a value of another type. The debug form lets the error message show the value.
        other => format!("{other:?}"),
    };
    let text = |device| match device {
        Device::Text(text) => text,
        Device::Keys(mut keys) => {
            let kind = keys.remove("type").map(value);
            let pairs = keys.into_iter().map(|(key, it)| format!("{key}={}", value(it)));
            kind.into_iter().chain(pairs).collect::<Vec<_>>().join(",")
        }
    };
    Ok(Vec::<Device>::deserialize(source)?.into_iter().map(text).collect())
}

/// The limit of a file's size. A configuration is a page of text; a larger file is a mistake, or a device
/// that never ends.
const LIMIT: u64 = 1 << 20;

/// Reads and parses `path`.
///
/// # Errors
/// When the file cannot be read, is larger than 1 MiB, or says something that is not known.
pub fn load(path: &Path) -> Result<File, Error> {
    use std::io::Read;
    let cannot = || Error::usage(format!("cannot use the configuration {}", path.display()));
    let file = std::fs::File::open(path).map_err(|error| cannot().because(error))?;
    let mut text = String::new();
    file.take(LIMIT + 1).read_to_string(&mut text).map_err(|error| cannot().because(error))?;
    if text.len() as u64 > LIMIT {
        return Err(cannot().because("it is larger than 1 MiB"));
    }
    toml::from_str(&text).map_err(|error| {
        cannot()
            .because(error.to_string().trim_end().to_owned())
            .hint("its names are those of the flags of `outboard run`, without the dashes")
    })
}
