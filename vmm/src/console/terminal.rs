//! The terminal on standard input. It is raw while a guest has it. Its settings are always restored
//! afterwards, also after a panic.
//!
//! Only processes in the terminal's foreground may change or read it. The kernel stops other processes that
//! try. Therefore each access checks first whether this process is in the foreground.
//!
//! The saved settings are global to the process, because a panic hook and an orderly end must find the same
//! ones.

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
    // The call fails for a terminal that does not control this process. Such a terminal has no foreground.
    tcgetpgrp(io::stdin()).map_or(true, |group| group == getpgrp())
}

/// Makes the terminal raw, unless it is raw already. Also called when this process goes on after a stop, in
/// which the shell has changed the settings. False when this process is in the background: it may then
/// neither change the settings nor read the keys.
pub(crate) fn take() -> bool {
    if !in_foreground() {
        return false;
    }
    let mut saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner);
    let changed = tcgetattr(io::stdin()).and_then(|cooked| {
        let mut raw = cooked.clone();
        raw.make_raw();
        // Only the input has to be raw. Output processing stays on, so that our own messages have proper line
        // ends.
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

/// Restores the saved settings, once. Also called from the panic hook.
pub(crate) fn restore() {
    // try_lock: a panic inside `take` must not wait for its own lock.
    let Ok(mut saved) = SAVED.try_lock() else { return };
    // In the background there is nothing to restore: the shell has done it.
    if let Some(cooked) = saved.take().filter(|_| in_foreground())
        && let Err(error) = tcsetattr(io::stdin(), OptionalActions::Now, &cooked)
    {
        log::warn!("cannot restore the terminal: {error}");
    }
}

/// Restores the terminal before a panic is printed. The message is then readable, and the shell is usable
/// afterwards.
pub(crate) fn restore_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        print(info);
    }));
}
