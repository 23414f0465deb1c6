//! SET_DEVICE_STATE_FD and CHECK_DEVICE_STATE: the backend's own state, moved through a pipe during a
//! migration.
//!
//! The typestate ensures that all rings are stopped. The state is opaque, may be empty and may be large.
//! Therefore the deadline is for each step of progress, and the caller gives the largest size that is
//! accepted.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use zerocopy::IntoBytes;

use crate::peer::deadline::{Deadline, Waited, never_block, wait_readable, wait_writable};
use crate::peer::{Cause, Error, Step};
use crate::vhost_user::channel::Answered;
use crate::vhost_user::message::{Fault, StateTransfer, parse};
use crate::vhost_user::request::Request;
use crate::vhost_user::session::Session;

/// Bits 0-7 of the answer: the backend's error code, 0 for none.
const ERROR_MASK: u64 = 0xff;

/// Bit 8 of the answer: no fd came with it, so our pipe is used.
const OURS: u64 = 1 << 8;

/// Bytes moved with one call: a writable pipe takes this many without blocking.
const CHUNK: usize = 4096;

/// The direction of the transfer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Save,
    Load,
}

/// A backend's answer to SET_DEVICE_STATE_FD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateAnswer {
    /// Our own end of the pipe is used.
    Ours,
    /// The fd that came with the answer is used instead.
    Theirs,
    /// The backend cannot move its state, with this code.
    Refused(u64),
}

/// Judges the answer to SET_DEVICE_STATE_FD, which came with `fds` fds.
pub fn parse_answer(payload: &[u8], fds: usize) -> Result<StateAnswer, Fault> {
    let value: u64 = parse(payload)?;
    if value & ERROR_MASK != 0 {
        return Ok(StateAnswer::Refused(value & ERROR_MASK));
    }
    let ours = value & OURS != 0;
    let due = u8::from(!ours);
    if fds != usize::from(due) {
        return Err(Fault::Fds { got: fds, least: due, most: due });
    }
    Ok(if ours { StateAnswer::Ours } else { StateAnswer::Theirs })
}

impl Session {
    /// Copies the backend's state to `sink`, at most `most` bytes. Returns the number of bytes, which may be
    /// 0.
    ///
    /// Needs DEVICE_STATE. Blocks for as long as the state keeps coming.
    pub fn save_state(&mut self, sink: &mut dyn Write, most: u64) -> Result<u64, Error> {
        let pipe = self.agree_on_pipe(Way::Save)?;
        let moved = match self.drain(&pipe, sink, most) {
            Ok(moved) => moved,
            Err(cause) => return Err(self.transfer_failed(cause)),
        };
        drop(pipe);
        self.check_state().map(|()| moved)
    }

    /// Gives the backend the state in `source`. Returns the number of bytes.
    ///
    /// Needs DEVICE_STATE. Blocks for as long as the backend keeps reading.
    pub fn load_state(&mut self, source: &mut dyn Read) -> Result<u64, Error> {
        let pipe = self.agree_on_pipe(Way::Load)?;
        let moved = match self.feed(&pipe, source) {
            Ok(moved) => moved,
            Err(cause) => return Err(self.transfer_failed(cause)),
        };
        // Closing the pipe marks the end of the state.
        drop(pipe);
        self.check_state().map(|()| moved)
    }

    /// Sends the backend one end of a pipe. Returns the end that we use.
    fn agree_on_pipe(&mut self, direction: Way) -> Result<OwnedFd, Error> {
        const REQUEST: Request = Request::SET_DEVICE_STATE_FD;
        let local = |errno: Errno| self.channel.error(REQUEST, Cause::Local(errno.into()));
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).map_err(local)?;
        let (ours, theirs, code) = match direction {
            Way::Save => (reader, writer, 0),
            Way::Load => (writer, reader, 1),
        };
        let transfer = StateTransfer { direction: code, phase: 0 };
        let Answered { payload, fds } = self.channel.ask(REQUEST, transfer.as_bytes(), &[theirs.as_fd()])?;
        let end = match parse_answer(&payload, fds.len()) {
            Ok(StateAnswer::Ours) => ours,
            Ok(StateAnswer::Theirs) => fds.into_iter().next().unwrap_or(ours),
            Ok(StateAnswer::Refused(code)) => return Err(self.channel.error(REQUEST, Cause::Refused(code))),
            Err(fault) => return Err(self.channel.malformed(REQUEST, fault)),
        };
        Ok(end)
    }

    fn drain(&self, pipe: &OwnedFd, sink: &mut dyn Write, most: u64) -> Result<u64, Cause> {
        let mut moved = 0u64;
        let mut chunk = [0; CHUNK];
        let mut deadline = self.channel.deadline();
        loop {
            never_block(pipe).map_err(Cause::Local)?;
            match rustix::io::read(pipe, &mut chunk) {
                Ok(0) => return Ok(moved),
                Ok(got) => {
                    moved = moved.saturating_add(u64::try_from(got).unwrap_or(u64::MAX));
                    if moved > most {
                        return Err(Cause::Malformed(Fault::Value {
                            field: "a state of size",
                            value: moved,
                        }));
                    }
                    sink.write_all(chunk.get(..got).unwrap_or(&chunk)).map_err(Cause::Local)?;
                    deadline = self.channel.deadline();
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(&deadline, wait_readable(pipe.as_fd(), &deadline))?,
                Err(errno) => return Err(Cause::Io(errno.into())),
            }
        }
    }

    fn feed(&self, pipe: &OwnedFd, source: &mut dyn Read) -> Result<u64, Cause> {
        let mut moved = 0u64;
        let mut chunk = [0; CHUNK];
        loop {
            let got = source.read(&mut chunk).map_err(Cause::Local)?;
            if got == 0 {
                return Ok(moved);
            }
            let mut rest = chunk.get(..got).unwrap_or(&chunk);
            let mut deadline = self.channel.deadline();
            while !rest.is_empty() {
                never_block(pipe).map_err(Cause::Local)?;
                match rustix::io::write(pipe, rest) {
                    Ok(sent) => {
                        rest = rest.get(sent..).unwrap_or_default();
                        moved = moved.saturating_add(u64::try_from(sent).unwrap_or(u64::MAX));
                        deadline = self.channel.deadline();
                    }
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => self.wait(&deadline, wait_writable(pipe.as_fd(), &deadline))?,
                    // The backend stopped reading. Its answer to CHECK_DEVICE_STATE tells whether that was an
                    // error.
                    Err(Errno::PIPE) => return Ok(moved),
                    Err(errno) => return Err(Cause::Io(errno.into())),
                }
            }
        }
    }

    fn wait(&self, deadline: &Deadline, waited: io::Result<Waited>) -> Result<(), Cause> {
        match waited.map_err(Cause::Io)? {
            Waited::Ready => Ok(()),
            Waited::TimedOut => Err(Cause::Silent(deadline.limit())),
        }
    }

    fn check_state(&mut self) -> Result<(), Error> {
        const REQUEST: Request = Request::CHECK_DEVICE_STATE;
        let deadline = self.channel.deadline();
        match self.channel.ask_u64(REQUEST, &deadline)? {
            0 => Ok(()),
            code => Err(self.channel.error(REQUEST, Cause::Refused(code))),
        }
    }

    /// A peer that fails in the middle of its state is lost. A failure of our own sink or source is not the
    /// peer's fault.
    fn transfer_failed(&mut self, cause: Cause) -> Error {
        let error = Error::new(self.channel.peer(), Step::StateTransfer, cause);
        if error.is_fatal() {
            self.channel.abandon();
        }
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_says_whose_end_is_used_and_its_fds_agree() {
        let answer = |value: u64, fds| parse_answer(&value.to_ne_bytes(), fds);
        assert_eq!(answer(0x100, 0), Ok(StateAnswer::Ours));
        assert_eq!(answer(0, 1), Ok(StateAnswer::Theirs));
        assert_eq!(answer(0x101, 0), Ok(StateAnswer::Refused(1)));
        assert!(answer(0x100, 1).is_err(), "fd returned and bit 8 set");
        assert!(answer(0, 0).is_err(), "neither");
        assert!(parse_answer(&[0; 4], 0).is_err());
    }
}
