//! The terminal: raw while a guest has it, itself again whatever happens.
//!
//! The saved settings are process-wide, because a panic hook and an orderly end must find the same ones.

use std::io;
use std::sync::{Mutex, PoisonError};

use rustix::termios::{OptionalActions, OutputModes, Termios, isatty, tcgetattr, tcsetattr};

static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Standard input in raw mode; as it was when dropped.
#[derive(Debug)]
#[must_use = "the terminal is restored when this is dropped"]
pub(crate) struct RawTerminal(());

impl RawTerminal {
    /// Enters raw mode when standard input is a terminal; `None` when it is not.
    ///
    /// # Errors
    /// When the terminal refuses.
    pub(crate) fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !isatty(&stdin) {
            return Ok(None);
        }
        let cooked = tcgetattr(&stdin)?;
        let mut raw = cooked.clone();
        raw.make_raw();
        // Our own messages keep their line ends: only input has to be raw.
        raw.output_modes |= OutputModes::OPOST | OutputModes::ONLCR;
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(cooked);
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Some(RawTerminal(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal its old settings back, once. Also called from the panic hook.
pub(crate) fn restore() {
    // try_lock: a panic inside `enter` must not wait for its own lock.
    let saved = SAVED.try_lock().ok().and_then(|mut saved| saved.take());
    if let Some(cooked) = saved
        && let Err(error) = tcsetattr(io::stdin(), OptionalActions::Now, &cooked)
    {
        log::warn!("cannot restore the terminal: {error}");
    }
}

/// Restores the terminal before a panic is printed, so that it is readable and the shell usable.
pub(crate) fn restore_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        print(info);
    }));
}
