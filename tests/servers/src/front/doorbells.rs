//! DEVICE_GET_REGION_IO_FDS: an eventfd for each write that the client's kernel may turn into a signal.

use std::fs::File;
use std::io::{Read, Result};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::wire::{Message, REPLY};
use crate::options::IoEntries;
use crate::serve::{Device, IoEvent, Shared};

const IOEVENTFD: u32 = 0;
const DATAMATCH: u32 = 1;
/// argsz, flags, index, count.
const FIXED: usize = 16;

/// The device's doorbells for one client.
pub(super) struct Doorbells {
    events: Vec<(IoEvent, File)>,
    form: IoEntries,
}

impl Doorbells {
    pub(super) fn new(events: Vec<IoEvent>, form: IoEntries) -> Result<Self> {
        let with_fd =
            |event| Ok((event, File::from(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)));
        Ok(Self { events: events.into_iter().map(with_fd).collect::<Result<_>>()?, form })
    }

    /// Passes signals on to the device until what is returned is dropped.
    pub(super) fn serve<D: Device + 'static>(&self, shared: Shared<D>) -> Result<UnixStream> {
        let (stop, stopped) = UnixStream::pair()?;
        let mut files = self.events.iter().map(|(_, file)| file.try_clone()).collect::<Result<Vec<_>>>()?;
        thread::spawn(move || {
            loop {
                let mut fds: Vec<_> = files.iter().map(|file| PollFd::new(file, PollFlags::IN)).collect();
                fds.push(PollFd::new(&stopped, PollFlags::IN));
                if poll(&mut fds, None).is_err() {
                    continue;
                }
                let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
                if ready.last() == Some(&true) {
                    return;
                }
                for ((number, file), _) in (0..).zip(&mut files).zip(ready).filter(|(_, ready)| *ready) {
                    let mut count = [0; 8];
                    if file.read_exact(&mut count).is_ok() {
                        shared.lock().doorbell(number, u64::from_ne_bytes(count));
                        shared.wake();
                    }
                }
            }
        });
        Ok(stop)
    }

    /// The reply; none when the request makes no sense.
    pub(super) fn answer(&self, message: &Message) -> Option<Message> {
        let word = |at: usize| {
            let bytes = message.body.get(at..at + 4)?;
            bytes.try_into().ok().map(u32::from_ne_bytes)
        };
        let (room, index) = (word(0)?, word(8)?);
        let events: Vec<_> = self.events.iter().filter(|(event, _)| event.region == index).collect();
        let entry = match self.form {
            IoEntries::Spec => 40,
            IoEntries::Libvfio => 48,
        };
        let size = u32::try_from(FIXED + entry * events.len()).ok()?;
        let fits = room >= size;
        let count = u32::try_from(events.len()).ok()?;
        let mut body: Vec<u8> = [size, 0, index, count].into_iter().flat_map(u32::to_ne_bytes).collect();
        let mut fds: Vec<OwnedFd> = Vec::new();
        for (number, (event, file)) in (0_u32..).zip(events.into_iter().filter(|_| fits)) {
            body.extend([event.offset, event.size].into_iter().flat_map(u64::to_ne_bytes));
            let flags = if event.value.is_some() { DATAMATCH } else { 0 };
            body.extend([number, IOEVENTFD, flags, 0].into_iter().flat_map(u32::to_ne_bytes));
            // Its entries have the place of a shadow before the value.
            if self.form == IoEntries::Libvfio {
                body.extend([0; 8]);
            }
            body.extend(event.value.unwrap_or(0).to_ne_bytes());
            fds.push(file.try_clone().ok()?.into());
        }
        let mut answer = Message::new(message.header.id, message.header.command, REPLY, body);
        answer.fds = fds;
        Some(answer)
    }
}
