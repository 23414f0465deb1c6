//! A terminal for a program that wants one.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::OFlags;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{InputModes, LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::capture::Capture;

/// A pseudo terminal: the user's side of it, and what the user sees.
#[derive(Debug)]
pub struct Pty {
    keyboard: File,
    terminal: OwnedFd,
    /// What is shown on it.
    pub screen: Capture,
}

impl Pty {
    /// Opens one.
    ///
    /// # Panics
    /// When the host has none.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "opening a terminal is no default")]
    pub fn new() -> Self {
        let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&user).unwrap();
        unlockpt(&user).unwrap();
        let name = ptsname(&user, Vec::new()).unwrap();
        let flags = i32::try_from(OFlags::NOCTTY.bits()).unwrap();
        let terminal = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(name.to_str().unwrap())
            .unwrap();
        let keyboard = File::from(user.try_clone().unwrap());
        Self { keyboard, terminal: terminal.into(), screen: Capture::new(File::from(user)) }
    }

    /// The program's side.
    ///
    /// # Panics
    /// When descriptors run out.
    #[must_use]
    pub fn terminal(&self) -> OwnedFd {
        self.terminal.try_clone().unwrap()
    }

    /// Types.
    ///
    /// # Panics
    /// When the terminal is gone.
    pub fn press(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).unwrap();
    }

    /// Changes input and local modes, as a shell does.
    ///
    /// # Panics
    /// When the terminal is gone.
    pub fn set(&self, settings: &Settings) {
        let mut termios = tcgetattr(&self.terminal).unwrap();
        termios.input_modes = InputModes::from_bits_retain(settings.input);
        termios.local_modes = LocalModes::from_bits_retain(settings.local);
        tcsetattr(&self.terminal, OptionalActions::Now, &termios).unwrap();
    }

    /// The terminal's settings.
    ///
    /// # Panics
    /// When the terminal is gone.
    #[must_use]
    pub fn settings(&self) -> Settings {
        Settings::from(&tcgetattr(&self.terminal).unwrap())
    }
}

/// The settings that a shell would miss, in a form that can be compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    input: u32,
    output: u32,
    control: u32,
    /// Line editing, echo and signals from keys.
    pub local: u32,
}

impl From<&Termios> for Settings {
    fn from(termios: &Termios) -> Self {
        Self {
            input: termios.input_modes.bits(),
            output: termios.output_modes.bits(),
            control: termios.control_modes.bits(),
            local: termios.local_modes.bits(),
        }
    }
}
