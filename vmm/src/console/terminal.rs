//! The terminal: raw while a guest has it, itself again whatever happens.
//!
//! Only the processes in a terminal's foreground may change or read it; the others are stopped by the kernel when they
//! try. So whoever wants the terminal looks first.
//!
//! The saved settings are process-wide, because a panic hook and an orderly end must find the same ones.

use std::io;
use std::sync::{Mutex, PoisonError};

use rustix::process::getpgrp;
use rustix::termios::{OptionalActions, OutputModes, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr};

static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Whether standard input is a terminal.
pub(crate) fn is_terminal() -> bool {
    isatty(io::stdin())
}

fn in_foreground() -> bool {
    // A terminal that does not control this process asks for no foreground.
    tcgetpgrp(io::stdin()).map_or(true, |group| group == getpgrp())
}

/// Makes the terminal raw, unless it is: also when this process goes on after a stop, in which the shell has changed it.
/// False when this process is in the background: neither the settings nor the keys are ours then.
pub(crate) fn take() -> bool {
    if !in_foreground() {
        return false;
    }
    let mut saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner);
    let changed = tcgetattr(io::stdin()).and_then(|cooked| {
        let mut raw = cooked.clone();
        raw.make_raw();
        // Our own messages keep their line ends: only input has to be raw.
        raw.output_modes |= OutputModes::OPOST | OutputModes::ONLCR;
        if raw.local_modes != cooked.local_modes || saved.is_none() {
            *saved = Some(cooked);
            tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        }
        Ok(())
    });
    if let Err(error) = changed {
        log::warn!("the terminal cannot be made raw: {error}");
    }
    true
}

/// Gives the terminal its old settings back, once. Also called from the panic hook.
pub(crate) fn restore() {
    // try_lock: a panic inside `take` must not wait for its own lock.
    let Ok(mut saved) = SAVED.try_lock() else { return };
    // The shell has restored the terminal of a process in the background.
    if let Some(cooked) = saved.take().filter(|_| in_foreground())
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
