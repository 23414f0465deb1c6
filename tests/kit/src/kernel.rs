//! The tiny kernel: a bare-metal guest of 10 KiB that drives virtio devices itself. It boots by PVH in
//! milliseconds on any KVM, also on one that emulates guest kernel code. Its command line says what it does;
//! `tests/payload/README.md` lists the modes, their arguments and the lines that they print.
//!
//! ```
//! # use outboard_testkit::kernel::{Answers, Blk, CommandLine, Operation};
//! let line = CommandLine::blk(Blk { requests: 2000, operation: Operation::Verify, ..Blk::default() });
//! assert_eq!(line.to_string(), "mode=blk n=2000 op=verify");
//! // What the console of a machine with this kernel holds in the end:
//! let answers = Answers::of("capacity=0x2000\nrequests=2000 interrupts=1999 errors=0\n");
//! assert_eq!((answers.number("requests"), answers.number("errors")), (Some(2000), Some(0)));
//! ```
//!
//! The addresses of devices are not in here: [`crate::machine::TestMachine`] adds them to the command line.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The image: an ELF64 with a PVH note, to be given to `--kernel`.
#[must_use]
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

/// What the mode `blk` does with a disk, one request after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blk {
    /// How many requests.
    pub requests: u32,
    /// What each of them does.
    pub operation: Operation,
    /// Bytes of a request: a multiple of 512, at most 4096.
    pub size: u32,
    /// The first sector.
    pub sector: u32,
    /// How many places, one after the other, the requests use by turns.
    pub span: u32,
    /// How many queues the requests use by turns, at most 8.
    pub queues: u32,
    /// How often the device is reset and set up before the requests.
    pub rounds: u32,
}

impl Default for Blk {
    fn default() -> Self {
        Self {
            requests: 1,
            operation: Operation::Read,
            size: 4096,
            sector: 0,
            span: 64,
            queues: 1,
            rounds: 1,
        }
    }
}

/// What a request of the mode `blk` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// It reads.
    Read,
    /// It writes.
    Write,
    /// It writes and reads back by turns, and what was read is compared with what was written.
    Verify,
}

/// One request of the mode `ask`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// The queue that carries the request.
    pub queue: u32,
    /// The bytes that the device may read.
    pub request: Vec<u8>,
}

/// How the kernel ends when it has done its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It powers the machine off. The default.
    PowerOff,
    /// It resets the machine.
    Reset,
    /// It crashes by a triple fault.
    TripleFault,
    /// It reports a panic to the pvpanic device.
    Panic,
    /// It halts for ever, and the machine runs on.
    Hang,
}

/// A command line for the tiny kernel, as [`fmt::Display`] writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandLine(String);

impl CommandLine {
    /// Begins with a mode: `hello`, `info`, `show`, `blk`, `rng`, `ask`, `loop`, `resize`, `poke`, `echo`,
    /// `cpus`, `abuse`, `badring`, `deep`, `drive`, `pci`.
    #[must_use]
    pub fn new(mode: &str) -> Self {
        Self(format!("mode={mode}"))
    }

    /// Says hello and ends: for a machine without devices.
    #[must_use]
    pub fn hello() -> Self {
        Self::new("hello")
    }

    /// Sends requests to a disk.
    #[must_use]
    pub fn blk(blk: Blk) -> Self {
        let usual = Blk::default();
        let line = Self::new("blk").arg("n", blk.requests);
        let line = match blk.operation {
            Operation::Read => line,
            Operation::Write => line.arg("op", "write"),
            Operation::Verify => line.arg("op", "verify"),
        };
        let numbers = [
            ("size", blk.size, usual.size),
            ("sector", blk.sector, usual.sector),
            ("span", blk.span, usual.span),
            ("queues", blk.queues, usual.queues),
            ("rounds", blk.rounds, usual.rounds),
        ];
        let given = numbers.into_iter().filter(|(_, value, usual)| value != usual);
        given.fold(line, |line, (key, value, _)| line.arg(key, value))
    }

    /// Reads random numbers, so many times.
    #[must_use]
    pub fn rng(requests: u32) -> Self {
        Self::new("rng").arg("n", requests)
    }

    /// Sends these requests to a device of any type, and prints the answers. `queues` are set up before; each
    /// answer has `room` for so many bytes. [`Answers::asked`] has the answers.
    #[must_use]
    pub fn ask(queues: u32, requests: &[Ask], room: u32) -> Self {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let line = Self::new("ask").arg("queues", queues).arg("answer", room);
        requests
            .iter()
            .fold(line, |line, ask| line.arg("request", format_args!("{}:{}", ask.queue, hex(&ask.request))))
    }

    /// How the kernel ends.
    #[must_use]
    pub fn end(self, ending: Ending) -> Self {
        let word = match ending {
            Ending::PowerOff => "off",
            Ending::Reset => "reset",
            Ending::TripleFault => "triple",
            Ending::Panic => "panic",
            Ending::Hang => "hang",
        };
        self.arg("end", word)
    }

    /// Names the virtio-mmio device to drive: its register page and the IOAPIC pin of its interrupt.
    #[must_use]
    pub fn device(self, base: u64, gsi: u32) -> Self {
        self.arg("mmio", format_args!("{base:#x}")).arg("gsi", gsi)
    }

    /// Names the virtio-pci device to drive: its number on the PCI bus.
    #[must_use]
    pub fn pci_device(self, number: u8) -> Self {
        self.arg("pci", number)
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

/// What the kernel printed on the console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answers<'a>(&'a str);

impl<'a> Answers<'a> {
    /// The answers in this console.
    #[must_use]
    pub fn of(console: &'a str) -> Self {
        Self(console)
    }

    /// The number in the last `key=…`, decimal or 0x….
    #[must_use]
    pub fn number(self, key: &str) -> Option<u64> {
        field(self.0, key)
    }

    /// The bytes that the device answered to each request of [`CommandLine::ask`]: all of the room, in the
    /// order of the requests.
    #[must_use]
    pub fn asked(self) -> Vec<Vec<u8>> {
        let byte = |digits: &[u8]| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok();
        let answers = self.0.lines().filter_map(|line| line.split_once("answer "));
        answers.map(|(_, hex)| hex.trim().as_bytes().chunks(2).filter_map(byte).collect()).collect()
    }

    /// The reason that the kernel gave, when it gave up.
    #[must_use]
    pub fn complaint(self) -> Option<&'a str> {
        complaint(self.0)
    }
}

/// The number in the last `key=…` that the kernel printed, decimal or 0x….
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

/// The text after `error: `, when the kernel gave up.
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

    #[test]
    fn only_what_differs_from_the_usual_is_written() {
        let blk = Blk { requests: 8, queues: 4, size: 512, ..Blk::default() };
        let line = CommandLine::blk(blk).end(Ending::Hang).device(0xd000_0000, 5);
        assert_eq!(line.to_string(), "mode=blk n=8 size=512 queues=4 end=hang mmio=0xd0000000 gsi=5");
    }

    #[test]
    fn requests_and_answers_are_bytes() {
        let ask = Ask { queue: 1, request: vec![0, 0xff] };
        assert_eq!(CommandLine::ask(2, &[ask], 3).to_string(), "mode=ask queues=2 answer=3 request=1:00ff");
        let console = "device=25\nused-length=2 answer 00ff00\nused-length=1 answer 010000\n";
        assert_eq!(Answers::of(console).asked(), [[0, 0xff, 0], [1, 0, 0]]);
    }
}
