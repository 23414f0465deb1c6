//! The thread `peers`: answers what backends ask on their own channels.
//!
//! It never blocks on any of them and never takes a device's lock, so a backend gets its answer even while a
//! vCPU holds the device and waits for that same backend. What needs the device is left as news for the
//! control loop.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use transport::vhost_user::{BackendChannel, BackendRequests, Served};

/// The handle on the thread; ends it when dropped.
pub(crate) struct Peers {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    /// Readable when a flag below is up.
    news: OwnedFd,
    /// "The configuration of device N changed."
    changed: Vec<AtomicBool>,
    /// Readable when the inbox or `end` is.
    wake: OwnedFd,
    inbox: Mutex<Vec<(usize, BackendChannel)>>,
    end: AtomicBool,
}

impl Peers {
    /// Prepares for `devices` devices; the thread starts with the first channel.
    ///
    /// # Errors
    /// When no eventfd can be had.
    pub(crate) fn new(devices: usize) -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let shared = Arc::new(Shared {
            news: eventfd(0, flags)?,
            changed: (0..devices).map(|_| AtomicBool::new(false)).collect(),
            wake: eventfd(0, flags)?,
            inbox: Mutex::new(Vec::new()),
            end: AtomicBool::new(false),
        });
        Ok(Peers { shared, thread: None })
    }

    /// Serves `channel` on behalf of device number `device` until the backend closes it.
    ///
    /// # Errors
    /// When the host refuses another thread.
    pub(crate) fn add(&mut self, device: usize, channel: BackendChannel) -> io::Result<()> {
        self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner).push((device, channel));
        if self.thread.is_none() {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new().name("peers".to_owned()).stack_size(256 << 10);
            self.thread = Some(thread.spawn(move || shared.serve())?);
        }
        ring(&self.shared.wake);
        Ok(())
    }

    /// Readable when [`Peers::take_news`] has something.
    pub(crate) fn news(&self) -> &OwnedFd {
        &self.shared.news
    }

    /// The devices whose configuration changed since the last call.
    pub(crate) fn take_news(&self) -> Vec<usize> {
        drain(&self.shared.news);
        let flags = self.shared.changed.iter().enumerate();
        flags.filter(|(_, flag)| flag.swap(false, Ordering::AcqRel)).map(|(index, _)| index).collect()
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        self.shared.end.store(true, Ordering::Release);
        ring(&self.shared.wake);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the thread `peers` panicked");
        }
    }
}

impl Shared {
    fn serve(&self) {
        let mut channels: Vec<(usize, BackendChannel)> = Vec::new();
        loop {
            drain(&self.wake);
            if self.end.load(Ordering::Acquire) {
                return;
            }
            channels.append(&mut self.inbox.lock().unwrap_or_else(PoisonError::into_inner));
            if let Err(error) = self.wait_and_serve(&mut channels) {
                log::error!("backends' requests are not answered any more: {error}");
                return;
            }
        }
    }

    /// One wait, then every channel that has something. A channel that ends is dropped: its device hears of it
    /// by the hang-up of the main socket, if the backend is gone.
    fn wait_and_serve(&self, channels: &mut Vec<(usize, BackendChannel)>) -> io::Result<()> {
        let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
        fds.extend(
            channels.iter().map(|(_, channel)| PollFd::from_borrowed_fd(channel.as_fd(), PollFlags::IN)),
        );
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<bool> = fds.iter().skip(1).map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        let mut ready = ready.into_iter();
        channels.retain_mut(|(device, channel)| {
            if !ready.next().unwrap_or(false) {
                return true;
            }
            match channel.serve(&Answers { shared: self, device: *device }) {
                Ok(Served::Requests(_)) => true,
                Ok(Served::HungUp) => false,
                Err(error) => {
                    log::warn!("the backend's own channel is closed: {error}");
                    false
                }
            }
        });
        Ok(())
    }
}

/// What one device's backend may ask for.
struct Answers<'a> {
    shared: &'a Shared,
    device: usize,
}

impl BackendRequests for Answers<'_> {
    fn config_changed(&self) {
        if let Some(flag) = self.shared.changed.get(self.device) {
            flag.store(true, Ordering::Release);
            ring(&self.shared.news);
        }
    }
}

fn ring(fd: &OwnedFd) {
    // A full counter is readable, which is all that matters.
    if let Err(error) = rustix::io::write(fd, &1_u64.to_ne_bytes())
        && error != Errno::AGAIN
    {
        log::error!("cannot signal an eventfd: {error}");
    }
}

fn drain(fd: &OwnedFd) {
    if let Err(error) = rustix::io::read(fd, &mut [0; 8])
        && error != Errno::AGAIN
    {
        log::error!("cannot read an eventfd: {error}");
    }
}
