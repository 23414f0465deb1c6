//! The tiny kernel: a bare-metal guest of 10 KiB that drives virtio-mmio itself. It boots by PVH in milliseconds on
//! any KVM, also on one that emulates guest kernel code, and does what its command line says; `README.md` beside this
//! file lists the modes, their arguments and the lines they print.
//!
//! ```
//! # use outboard_tests::payload::{CommandLine, field};
//! let line = CommandLine::new("blk").device(0xd000_0000, 5).arg("n", 2000);
//! assert_eq!(line.to_string(), "mode=blk mmio=0xd0000000 gsi=5 n=2000");
//! // … boot `tiny_kernel()` with it, then read the console:
//! let console = "capacity=0x2000\nrequests=2000 interrupts=1999 errors=0\n";
//! assert_eq!(field(console, "errors"), Some(0));
//! ```
//!
//! Must never know an address of the board: the command line names them.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The image: an ELF64 with a PVH note, to be given to `--kernel`.
pub fn tiny_kernel() -> &'static [u8] {
    include_bytes!(concat!(env!("OUT_DIR"), "/tiny-kernel.elf"))
}

/// Writes the image into `folder` as `tiny-kernel.elf` and returns its path.
///
/// # Errors
/// Those of writing the file.
pub fn write_tiny_kernel(folder: &Path) -> io::Result<PathBuf> {
    let path = folder.join("tiny-kernel.elf");
    fs::write(&path, tiny_kernel())?;
    Ok(path)
}

/// A command line for the tiny kernel, as [`fmt::Display`] writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandLine(String);

impl CommandLine {
    /// Begins with a mode: `hello`, `info`, `show`, `blk`, `rng`, `loop`, `resize`, `poke`, `echo`, `cpus`,
    /// `abuse`, `badring`, `deep`, `drive`, `pci`.
    #[must_use]
    pub fn new(mode: &str) -> Self {
        Self(format!("mode={mode}"))
    }

    /// Names the virtio-mmio device to drive: its register page and the IOAPIC pin of its interrupt.
    #[must_use]
    pub fn device(self, base: u64, gsi: u32) -> Self {
        self.arg("mmio", format_args!("{base:#x}")).arg("gsi", gsi)
    }

    /// Adds `key=value`. Neither may contain a space.
    #[must_use]
    pub fn arg(mut self, key: &str, value: impl fmt::Display) -> Self {
        self.0.push_str(&format!(" {key}={value}"));
        self
    }
}

impl fmt::Display for CommandLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The number in the last `key=…` that the payload printed, decimal or 0x….
#[must_use]
pub fn field(console: &str, key: &str) -> Option<u64> {
    console
        .split_whitespace()
        .filter_map(|word| word.split_once('='))
        .filter(|(name, _)| *name == key)
        .filter_map(|(_, value)| match value.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => value.parse().ok(),
        })
        .next_back()
}

/// The text after `error: `, when the payload gave up.
#[must_use]
pub fn complaint(console: &str) -> Option<&str> {
    console.lines().find_map(|line| line.strip_prefix("error: "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_is_a_small_elf64_with_a_pvh_note_in_front() {
        let image = tiny_kernel();
        assert_eq!(image.get(..5), Some(b"\x7fELF\x02".as_slice()));
        assert!(image.len() < 32 * 1024, "{} bytes", image.len());
        // Name size 4, descriptor size 8, type 18, "Xen".
        let note = b"\x04\0\0\0\x08\0\0\0\x12\0\0\0Xen\0";
        assert!(image.windows(note.len()).any(|window| window == note));
    }

    #[test]
    fn the_last_of_several_fields_counts() {
        let console = "capacity=0x2000\r\ncapacity=0x4000\r\nrequests=7 interrupts=6 errors=0\r\n";
        assert_eq!(field(console, "capacity"), Some(0x4000));
        assert_eq!(field(console, "requests"), Some(7));
        assert_eq!(field(console, "request"), None);
    }

    #[test]
    fn a_complaint_is_found_and_its_absence_too() {
        assert_eq!(
            complaint("capacity=0x1\nerror: no answer to a request\n"),
            Some("no answer to a request")
        );
        assert_eq!(complaint("requests=1 interrupts=1 errors=0\n"), None);
    }
}
