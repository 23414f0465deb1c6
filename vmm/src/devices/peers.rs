//! The thread `peers`: it answers the requests that backends and servers make on their own.
//!
//! The thread must never wait for a backend or server and must never take a device's lock. A backend
//! therefore gets its answer even while a vCPU holds the device and waits for that same backend. Work that
//! needs the device is posted as a job to the device's attendant: the thread of the device that may wait for
//! its backend.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use devices::pci::vfio_user::VfioUserDevice;
use devices::virtio::attendant::Job;
use devices::virtio::backend::requests::{Answers, OwnChannel};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use transport::peer::Cause;
use transport::vfio_user::{self, Receiver};
use transport::vhost_user::message::{Iotlb, ShmemArea, Uuid};
use transport::vhost_user::{BackendRequests, NotifierArea, Refused, Served};

use crate::devices::shared_objects::{Owner, SharedObjects};

/// The handle of the thread. The thread ends when the handle is dropped.
pub(crate) struct Peers {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// One backend's own channel, and the connection that it belongs to.
pub(crate) struct Line {
    owner: Owner,
    own: OwnChannel,
}

/// A source that the thread listens to.
pub(crate) enum Heard {
    /// A backend's own channel.
    Backend(Line),
    /// A vfio-user server's connection, while no other thread waits for a reply on it.
    Server(Receiver, Arc<VfioUserDevice>),
    /// The eventfd by which KVM reports that the guest has served the interrupt of a server's pin.
    Pin(Arc<VfioUserDevice>),
}

impl Heard {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Heard::Backend(line) => line.own.channel.as_fd(),
            Heard::Server(receiver, _) => receiver.as_fd(),
            Heard::Pin(device) => device.calls.served().as_fd(),
        }
    }
}

/// One lookup of a shared object. The backend that asks waits for the answer. If this is dropped unanswered,
/// the lookup is refused.
struct Lookup {
    shared: Arc<Shared>,
    line: Option<Line>,
}

impl Lookup {
    /// Sends the answer, and gives the channel back to the thread.
    fn answer(&mut self, found: Result<OwnedFd, Refused>) {
        let Some(mut line) = self.line.take() else { return };
        lock(&self.shared.waiting).retain(|device| *device != line.owner.device);
        if let Err(error) = line.own.channel.answer_lookup(found) {
            log::warn!("the backend's own channel is closed: {error}");
        }
        // A closed channel goes back as well, so that the thread forgets the objects of its connection.
        lock(&self.shared.inbox).push(Heard::Backend(line));
        ring(&self.shared.wake);
    }
}

impl Drop for Lookup {
    fn drop(&mut self) {
        self.answer(Err(Refused));
    }
}

/// Posts a job to a device's attendant. Never waits; false when the device has no attendant any more.
type Post = dyn Fn(Job) -> bool + Send + Sync;

struct Shared {
    /// The jobs' receivers: one attendant for each device number.
    attendants: Mutex<BTreeMap<usize, Arc<Post>>>,
    /// One flag for each device: the log already has the message that its backend found a ring in error.
    ring_errors: Vec<AtomicBool>,
    /// The devices whose backends wait for the answer to a lookup.
    waiting: Mutex<Vec<usize>>,
    /// The number of connections so far.
    connections: AtomicU64,
    /// Readable when the inbox has new sources or `end` was set.
    wake: OwnedFd,
    inbox: Mutex<Vec<Heard>>,
    end: AtomicBool,
}

impl Peers {
    /// Prepares for `devices` devices. The thread starts with the first source.
    ///
    /// # Errors
    /// When no eventfd can be had.
    pub(crate) fn new(devices: usize) -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let shared = Arc::new(Shared {
            attendants: Mutex::default(),
            ring_errors: (0..devices).map(|_| AtomicBool::new(false)).collect(),
            waiting: Mutex::new(Vec::new()),
            connections: AtomicU64::new(0),
            wake: eventfd(0, flags)?,
            inbox: Mutex::new(Vec::new()),
            end: AtomicBool::new(false),
        });
        Ok(Peers { shared, thread: Mutex::new(None) })
    }

    /// Serves `channel` for device number `device` until the backend closes it.
    ///
    /// # Errors
    /// When the host refuses another thread.
    pub(crate) fn add(&self, device: usize, channel: OwnChannel) -> io::Result<()> {
        let connection = self.shared.connections.fetch_add(1, Ordering::Relaxed);
        self.listen(Heard::Backend(Line { owner: Owner { device, connection }, own: channel }))
    }

    /// Listens to the source `heard` until it ends.
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

    /// Names the attendant: from now on jobs for device number `device` go to `post`.
    pub(crate) fn attend(&self, device: usize, post: impl Fn(Job) -> bool + Send + Sync + 'static) {
        lock(&self.shared.attendants).insert(device, Arc::new(post));
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

impl Shared {
    /// Posts a job to a device's attendant.
    fn post(&self, device: usize, job: Job) {
        let post = lock(&self.attendants).get(&device).cloned();
        // Without an attendant the job is dropped. A lookup is refused when its job is dropped.
        if !post.is_some_and(|post| post(job)) {
            log::debug!("device number {device} has no attendant");
        }
    }

    /// Whether a device's backend waits for the answer to its own lookup. Such a backend cannot be asked for
    /// an object. The device stays in the list until its lookup is answered.
    fn is_waiting(&self, device: usize) -> bool {
        lock(&self.waiting).contains(&device)
    }

    fn serve(self: &Arc<Self>) {
        let mut lines: Vec<Heard> = Vec::new();
        let objects = RefCell::default();
        loop {
            drain(&self.wake);
            if self.end.load(Ordering::Acquire) {
                return;
            }
            lines.append(&mut lock(&self.inbox));
            close_replaced(&mut lines, &objects);
            if let Err(error) = self.wait_and_serve(&mut lines, &objects) {
                log::error!("backends' requests are not answered any more: {error}");
                return;
            }
        }
    }

    /// Waits once, then serves every source that is readable. A channel that ends is dropped. If its backend
    /// is gone, the device learns that from the hang-up of the main socket.
    fn wait_and_serve(
        self: &Arc<Self>,
        lines: &mut Vec<Heard>,
        objects: &RefCell<SharedObjects>,
    ) -> io::Result<()> {
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

    /// Serves one source. Gives the source back if the thread should go on listening to it.
    fn hear(self: &Arc<Self>, heard: Heard, objects: &RefCell<SharedObjects>) -> Option<Heard> {
        match heard {
            Heard::Backend(line) => self.serve_line(line, objects).map(Heard::Backend),
            Heard::Server(mut receiver, device) => match receiver.serve() {
                Ok(vfio_user::Served::Messages(_)) => Some(Heard::Server(receiver, device)),
                Ok(vfio_user::Served::HungUp) => None,
                // The control loop notices that the connection is hung up, and cleans up.
                Err(error) => {
                    match error.cause() {
                        Cause::Closed => device.link.hung_up(),
                        _ => device.link.give_up(&error.to_string()),
                    }
                    None
                }
            },
            Heard::Pin(device) => {
                device.pin_served();
                (!device.link.is_gone()).then_some(Heard::Pin(device))
            }
        }
    }

    /// Serves one backend's own channel. Gives the channel back if the thread should go on serving it.
    fn serve_line(self: &Arc<Self>, mut line: Line, objects: &RefCell<SharedObjects>) -> Option<Line> {
        let (owner, wanted) = (line.owner, Cell::new(None));
        let OwnChannel { channel, answers } = &mut line.own;
        let served = channel.serve(&Asked { shared: self, owner, answers, objects, wanted: &wanted });
        match served {
            Ok(Served::Requests(_)) => return Some(line),
            Ok(Served::Deferred) => {
                let (uuid, exporter) = wanted.into_inner()?;
                lock(&self.waiting).push(owner.device);
                let mut lookup = Lookup { shared: Arc::clone(self), line: Some(line) };
                self.post(exporter, Job::Lookup(uuid, Box::new(move |found| lookup.answer(found))));
                return None;
            }
            Ok(Served::HungUp) => {}
            Err(error) => log::warn!("the backend's own channel is closed: {error}"),
        }
        objects.borrow_mut().forget(owner);
        None
    }
}

/// Removes the channels whose connections have ended, and forgets the objects of those connections. For each
/// device the last such channel is kept open: a backend that is lost may keep its end open and silent, and
/// one such channel for each device costs little.
fn close_replaced(lines: &mut Vec<Heard>, objects: &RefCell<SharedObjects>) {
    let owner = |heard: &Heard| match heard {
        Heard::Backend(line) => Some(line.owner),
        Heard::Server(..) | Heard::Pin(_) => None,
    };
    let owners: Vec<Owner> = lines.iter().filter_map(owner).collect();
    lines.retain(|heard| match heard {
        Heard::Backend(Line { owner, own }) if own.channel.has_ended() => {
            objects.borrow_mut().forget(*owner);
            let later = |other: &&Owner| other.device == owner.device && other.connection > owner.connection;
            owners.iter().filter(later).count() <= 1
        }
        _ => true,
    });
}

/// The requests that one device's backend may make.
struct Asked<'a> {
    shared: &'a Shared,
    owner: Owner,
    answers: &'a Answers,
    objects: &'a RefCell<SharedObjects>,
    /// Set by a deferred lookup: the object that the backend asks for, and the device whose backend has it.
    wanted: &'a Cell<Option<(Uuid, usize)>>,
}

impl BackendRequests for Asked<'_> {
    fn config_changed(&self) {
        self.shared.post(self.owner.device, Job::Reload);
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
        // Logged once for each device, because a backend may repeat this request without limit.
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

    /// An object of another device's backend is fetched by that device's attendant, so such a lookup is
    /// deferred. A lookup of the backend's own object is refused: the backend would have to answer while it
    /// waits.
    fn defers_lookup(&self, uuid: Uuid) -> bool {
        let exporter = self.objects.borrow().owner(uuid).map(|owner| owner.device);
        let exporter =
            exporter.filter(|device| *device != self.owner.device && !self.shared.is_waiting(*device));
        self.wanted.set(exporter.map(|device| (uuid, device)));
        exporter.is_some()
    }
}

/// A poisoned lock is used as it is: a panic never leaves the values under these locks half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ring(fd: &OwnedFd) {
    // A full counter refuses the write. The eventfd is then readable already, so nothing is lost.
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
