//! The thread `peers`: answers what backends and servers ask on their own.
//!
//! It never blocks on any of them and never takes a device's lock, so a backend gets its answer even while a
//! vCPU holds the device and waits for that same backend. What needs the device is left as news for the
//! control loop.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use devices::pci::vfio_user::Remote;
use devices::virtio::backend::requests::{Answers, OwnChannel};
use devices::virtio::recovery::revival::Trial;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use transport::vfio_user::{self, Receiver};
use transport::vhost_user::message::{Iotlb, ShmemArea, Uuid};
use transport::vhost_user::{BackendRequests, NotifierArea, Refused, Served};

use crate::control::shared_objects::{Owner, SharedObjects};

/// The handle on the thread; ends it when dropped.
pub(crate) struct Peers {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the control loop has to act upon.
#[derive(Debug)]
pub(crate) enum News {
    /// The configuration of this device changed.
    ConfigChanged(usize),
    /// This broken device was reset and wants its backend looked for.
    Wanted(usize, Trial),
    /// This device has a backend again; the descriptor tells when that one is gone.
    Recovered(usize, OwnedFd),
    /// A backend wants the descriptor of another one's object.
    Lookup(Box<Lookup>),
}

/// A backend's channel, as long as it lives.
pub(crate) struct Line {
    owner: Owner,
    own: OwnChannel,
}

/// What the thread listens to.
pub(crate) enum Heard {
    /// A backend's own channel.
    Backend(Line),
    /// A vfio-user server, while nobody waits for its reply.
    Server(Receiver, Arc<Remote>),
    /// The guest's end of the interrupts of a server's pin.
    Pin(Arc<Remote>),
}

impl Heard {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Heard::Backend(line) => line.own.channel.as_fd(),
            Heard::Server(receiver, _) => receiver.as_fd(),
            Heard::Pin(remote) => remote.calls.served().as_fd(),
        }
    }
}

/// A lookup of a shared object; its backend waits for [`Peers::found`]. Its channel closes when it is dropped.
pub(crate) struct Lookup {
    line: Line,
    /// The number of the device whose backend has the object.
    pub(crate) exporter: usize,
    /// The object.
    pub(crate) uuid: Uuid,
}

impl std::fmt::Debug for Lookup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lookup")
            .field("exporter", &self.exporter)
            .field("uuid", &self.uuid)
            .finish_non_exhaustive()
    }
}

struct Shared {
    /// Readable when a flag below is up.
    news: OwnedFd,
    /// "The configuration of device N changed."
    changed: Vec<AtomicBool>,
    /// "The log knows that a backend found a ring of device N in error."
    ring_errors: Vec<AtomicBool>,
    /// "Device N wants its backend looked for." At most one a device: it asks again when that search is over.
    wanted: Mutex<Vec<(usize, Trial)>>,
    recovered: Mutex<Vec<(usize, OwnedFd)>>,
    lookups: Mutex<Vec<Lookup>>,
    /// The devices of lookups that are not answered yet.
    waiting: Mutex<Vec<usize>>,
    /// Connections so far.
    connections: AtomicU64,
    /// Readable when the inbox or `end` is.
    wake: OwnedFd,
    inbox: Mutex<Vec<Heard>>,
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
            ring_errors: (0..devices).map(|_| AtomicBool::new(false)).collect(),
            wanted: Mutex::new(Vec::new()),
            recovered: Mutex::new(Vec::new()),
            lookups: Mutex::new(Vec::new()),
            waiting: Mutex::new(Vec::new()),
            connections: AtomicU64::new(0),
            wake: eventfd(0, flags)?,
            inbox: Mutex::new(Vec::new()),
            end: AtomicBool::new(false),
        });
        Ok(Peers { shared, thread: Mutex::new(None) })
    }

    /// Serves `channel` on behalf of device number `device` until the backend closes it.
    ///
    /// # Errors
    /// When the host refuses another thread.
    pub(crate) fn add(&self, device: usize, channel: OwnChannel) -> io::Result<()> {
        let connection = self.shared.connections.fetch_add(1, Ordering::Relaxed);
        self.listen(Heard::Backend(Line { owner: Owner { device, connection }, own: channel }))
    }

    /// Listens to `heard` until it ends.
    ///
    /// # Errors
    /// When the host refuses another thread.
    pub(crate) fn listen(&self, heard: Heard) -> io::Result<()> {
        lock(&self.shared.inbox).push(heard);
        let mut thread = lock(&self.thread);
        if thread.is_none() {
            let shared = Arc::clone(&self.shared);
            let builder = std::thread::Builder::new().name("peers".to_owned()).stack_size(256 << 10);
            *thread = Some(builder.spawn(move || shared.serve())?);
        }
        ring(&self.shared.wake);
        Ok(())
    }

    /// Tells the control loop that device number `device` has a backend again. Called by its recovery thread.
    pub(crate) fn recovered(&self, device: usize, hang_up: OwnedFd) {
        lock(&self.shared.recovered).push((device, hang_up));
        ring(&self.shared.news);
    }

    /// Asks the control loop to look for the backend of device number `device`. Never waits.
    pub(crate) fn want(&self, device: usize, trial: Trial) {
        lock(&self.shared.wanted).push((device, trial));
        ring(&self.shared.news);
    }

    /// Answers a lookup, and has its channel served again. Called by the control loop.
    pub(crate) fn found(&self, lookup: Box<Lookup>, found: Result<OwnedFd, Refused>) {
        let Lookup { mut line, .. } = *lookup;
        lock(&self.shared.waiting).retain(|device| *device != line.owner.device);
        if let Err(error) = line.own.channel.answer_lookup(found) {
            log::warn!("the backend's own channel is closed: {error}");
        }
        // Also a closed one, whose objects have to go.
        lock(&self.shared.inbox).push(Heard::Backend(line));
        ring(&self.shared.wake);
    }

    /// Readable when [`Peers::take_news`] has something.
    pub(crate) fn news(&self) -> &OwnedFd {
        &self.shared.news
    }

    /// What happened since the last call.
    pub(crate) fn take_news(&self) -> Vec<News> {
        drain(&self.shared.news);
        let recovered = std::mem::take(&mut *lock(&self.shared.recovered));
        let mut news: Vec<News> =
            recovered.into_iter().map(|(index, fd)| News::Recovered(index, fd)).collect();
        news.extend(lock(&self.shared.lookups).drain(..).map(|lookup| News::Lookup(Box::new(lookup))));
        news.extend(lowered(&self.shared.changed).map(News::ConfigChanged));
        let wanted = std::mem::take(&mut *lock(&self.shared.wanted));
        news.extend(wanted.into_iter().map(|(index, trial)| News::Wanted(index, trial)));
        news
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        self.shared.end.store(true, Ordering::Release);
        ring(&self.shared.wake);
        if lock(&self.thread).take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the thread `peers` panicked");
        }
    }
}

/// The flags that were up.
fn lowered(flags: &[AtomicBool]) -> impl Iterator<Item = usize> {
    let flags = flags.iter().enumerate();
    flags.filter(|(_, flag)| flag.swap(false, Ordering::AcqRel)).map(|(index, _)| index)
}

impl Shared {
    /// Puts up a device's flag.
    fn raise(&self, flags: &[AtomicBool], device: usize) {
        if let Some(flag) = flags.get(device) {
            flag.store(true, Ordering::Release);
            ring(&self.news);
        }
    }

    /// Whether a device's backend waits for an object itself, and so cannot be asked for one. It stays in the
    /// list until its lookup is answered.
    fn is_waiting(&self, device: usize) -> bool {
        lock(&self.waiting).contains(&device)
    }

    fn serve(&self) {
        let mut lines: Vec<Heard> = Vec::new();
        let objects = RefCell::default();
        loop {
            drain(&self.wake);
            if self.end.load(Ordering::Acquire) {
                return;
            }
            lines.append(&mut lock(&self.inbox));
            if let Err(error) = self.wait_and_serve(&mut lines, &objects) {
                log::error!("backends' requests are not answered any more: {error}");
                return;
            }
        }
    }

    /// One wait, then every channel that has something. A channel that ends is dropped: its device hears of it
    /// by the hang-up of the main socket, if the backend is gone.
    fn wait_and_serve(&self, lines: &mut Vec<Heard>, objects: &RefCell<SharedObjects>) -> io::Result<()> {
        let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
        fds.extend(lines.iter().map(|line| PollFd::from_borrowed_fd(line.as_fd(), PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<bool> = fds.iter().skip(1).map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        for (line, ready) in std::mem::take(lines).into_iter().zip(ready) {
            if ready {
                lines.extend(self.hear(line, objects));
            } else {
                lines.push(line);
            }
        }
        Ok(())
    }

    /// Serves what there is; gives it back if it is to be listened to again.
    fn hear(&self, heard: Heard, objects: &RefCell<SharedObjects>) -> Option<Heard> {
        match heard {
            Heard::Backend(line) => self.serve_line(line, objects).map(Heard::Backend),
            Heard::Server(mut receiver, remote) => match receiver.serve() {
                Ok(vfio_user::Served::Messages(_)) => Some(Heard::Server(receiver, remote)),
                Ok(vfio_user::Served::HungUp) => None,
                // The control loop sees the connection hung up, and tidies up.
                Err(error) => {
                    remote.link.give_up(&error.to_string());
                    None
                }
            },
            Heard::Pin(remote) => {
                remote.pin_served();
                (!remote.link.is_broken()).then_some(Heard::Pin(remote))
            }
        }
    }

    /// Serves a channel; gives it back if it is to be served again.
    fn serve_line(&self, mut line: Line, objects: &RefCell<SharedObjects>) -> Option<Line> {
        let (owner, wanted) = (line.owner, Cell::new(None));
        let OwnChannel { channel, answers } = &mut line.own;
        let served = channel.serve(&Asked { shared: self, owner, answers, objects, wanted: &wanted });
        match served {
            Ok(Served::Requests(_)) => return Some(line),
            Ok(Served::Deferred) => {
                let (uuid, exporter) = wanted.into_inner()?;
                lock(&self.waiting).push(owner.device);
                lock(&self.lookups).push(Lookup { line, exporter, uuid });
                ring(&self.news);
                return None;
            }
            Ok(Served::HungUp) => {}
            Err(error) => log::warn!("the backend's own channel is closed: {error}"),
        }
        objects.borrow_mut().forget(owner);
        None
    }
}

/// What one device's backend may ask for.
struct Asked<'a> {
    shared: &'a Shared,
    owner: Owner,
    answers: &'a Answers,
    objects: &'a RefCell<SharedObjects>,
    /// The object that it waits for, and the device that has it.
    wanted: &'a Cell<Option<(Uuid, usize)>>,
}

impl BackendRequests for Asked<'_> {
    fn config_changed(&self) {
        self.shared.raise(&self.shared.changed, self.owner.device);
    }

    fn iotlb(&self, message: Iotlb) -> Result<(), Refused> {
        self.answers.iotlb(&message)
    }

    fn vring_call(&self, ring: u32) -> Result<(), Refused> {
        self.answers.vring_call(ring)
    }

    fn host_notifier(&self, ring: u8, area: Option<NotifierArea>) -> Result<(), Refused> {
        self.answers.host_notifier(ring, area)
    }

    fn vring_error(&self, ring: u32) -> Result<(), Refused> {
        let device = self.owner.device;
        // A backend may say it as often as it likes.
        if self.shared.ring_errors.get(device).is_some_and(|logged| !logged.swap(true, Ordering::Relaxed)) {
            log::warn!("a backend found ring {ring} of device number {device} in error (logged once)");
        }
        Ok(())
    }

    fn shmem_map(&self, area: ShmemArea, fd: OwnedFd) -> Result<(), Refused> {
        self.answers.shmem_map(&area, fd)
    }

    fn shmem_unmap(&self, area: ShmemArea) -> Result<(), Refused> {
        self.answers.shmem_unmap(&area)
    }

    fn shared_object_add(&self, uuid: Uuid) -> Result<(), Refused> {
        self.objects.borrow_mut().add(uuid, self.owner).then_some(()).ok_or(Refused)
    }

    fn shared_object_remove(&self, uuid: Uuid) -> Result<(), Refused> {
        self.objects.borrow_mut().remove(uuid, self.owner).then_some(()).ok_or(Refused)
    }

    /// What another device's backend has is asked for by the control loop. A backend that asks for its own
    /// would have to answer while it waits, and is refused.
    fn defers_lookup(&self, uuid: Uuid) -> bool {
        let exporter = self.objects.borrow().owner(uuid).map(|owner| owner.device);
        let exporter =
            exporter.filter(|device| *device != self.owner.device && !self.shared.is_waiting(*device));
        self.wanted.set(exporter.map(|device| (uuid, device)));
        exporter.is_some()
    }
}

/// A thread that panicked leaves these locks' values whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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

#[cfg(test)]
#[path = "peers_tests.rs"]
mod tests;
