//! `--config FILE.toml`: the same names as the flags of `outboard run`.
//!
//! ```toml
//! kernel = "/boot/vmlinuz"
//! memory = "512M"
//! cpus = 2
//! vhost-user = ["blk,socket=/run/blk.sock,id=disk0", "net,socket=/run/net.sock"]
//! ```

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::Error;

/// What a configuration file may say. A name that is not here is refused.
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
    /// `--vhost-user`, once an item
    #[serde(default)]
    pub vhost_user: Vec<String>,
    /// `--vfio-user`, once an item
    #[serde(default)]
    pub vfio_user: Vec<String>,
    /// `--serial`
    pub serial: Option<String>,
    /// `--stats`
    pub stats: Option<String>,
    /// `--trace`
    pub trace: Option<String>,
    /// `--no-reboot`
    #[serde(default)]
    pub no_reboot: bool,
    /// `--discovery`
    pub discovery: Option<String>,
}

/// A configuration is a page of text; more is a mistake, or a device that never ends.
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
