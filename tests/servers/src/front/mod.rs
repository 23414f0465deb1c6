//! Between client and crate: passes messages on, and speaks what the crate does not.
//!
//! | what | here |
//! |--|--|
//! | VERSION | the crate's answer, with capabilities of our own (never above the client's) |
//! | REGION_WRITE_MULTI | single writes to the crate, one answer to the client |
//! | DEVICE_GET_REGION_IO_FDS | eventfds for the device's doorbells |
//! | DMA_READ, DMA_WRITE | sent for the device, on the socket or a twin of it |
//! | unknown commands | an error with an errno; the crate would lose its place in the stream |
//!
//! Threads: one for each direction, one for doorbells, one for the twin. None of them takes the device's lock
//! while the device may wait for a message, but the doorbells', which no message waits for.

mod dma;
mod doorbells;
pub mod wire;

use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use serde_json::{Value, json};
use vfio_user::{IrqInfo, Server, ServerRegion};

use crate::options::{Common, Extended};
use crate::serve::{Device, Shared};
use dma::Dma;
use doorbells::Doorbells;
use wire::{Header, Message, NO_REPLY, command};

const EINVAL: u32 = 22;
const ENOTSUP: u32 = 95;
/// Writes in one REGION_WRITE_MULTI.
const MAX_WRITES: u64 = 4096;
/// Bytes of one of them.
const WRITE_ENTRY: usize = 24;

/// Listens at the socket, and gives the crate a server of which each client's front is the client.
///
/// # Errors
/// When there is no listening there.
pub fn listen<D: Device + 'static>(
    shared: &Shared<D>,
    common: &Common,
    irqs: Vec<IrqInfo>,
    regions: Vec<ServerRegion>,
) -> Result<Server> {
    // An abstract name leaves no file. The clients' socket comes last: who sees it listen may count this
    // server's descriptors.
    let inner = SocketAddr::from_abstract_name(format!("outboard-front-{}", std::process::id()))?;
    let server = Server::from_owned_fd(UnixListener::bind_addr(&inner)?.into(), true, irqs, regions);
    let outer = UnixListener::bind(&common.socket)?;
    let (shared, common) = (shared.clone(), common.clone());
    thread::spawn(move || {
        for client in outer.incoming() {
            if common.once {
                std::fs::remove_file(&common.socket).unwrap_or_default();
            }
            let ended = client.and_then(|client| Link::new(client, &inner, &common.extended)?.run(&shared));
            log::info!("front: {ended:?}");
        }
    });
    Ok(server)
}

/// A REGION_WRITE_MULTI of which the last write is with the crate.
#[derive(Clone, Copy, Debug)]
struct Multi {
    id: u16,
    count: u64,
}

/// One client.
struct Link {
    client: Arc<UnixStream>,
    /// Whoever sends to the client holds it for one whole message.
    sending: Arc<Mutex<()>>,
    crate_side: UnixStream,
    options: Extended,
    dma: Arc<Dma>,
    /// The client's minor version and capabilities.
    proposed: Mutex<(u16, Value)>,
    multis: Mutex<Vec<Multi>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Link {
    fn new(client: UnixStream, inner: &SocketAddr, options: &Extended) -> Result<Arc<Self>> {
        let (client, sending) = (Arc::new(client), Arc::new(Mutex::new(())));
        Ok(Arc::new(Self {
            crate_side: UnixStream::connect_addr(inner)?,
            options: options.clone(),
            dma: Arc::new(Dma::new(Arc::clone(&client), Arc::clone(&sending))),
            client,
            sending,
            proposed: Mutex::default(),
            multis: Mutex::default(),
        }))
    }

    /// Until the client has gone.
    fn run<D: Device + 'static>(self: Arc<Self>, shared: &Shared<D>) -> Result<()> {
        let doorbells = {
            let mut device = shared.lock();
            device.memory().set_messages(Some(Arc::<Dma>::clone(&self.dma)));
            Doorbells::new(device.io_events(), self.options.io_entries)?
        };
        let _ringing = doorbells.serve(shared.clone())?;
        let down = Arc::clone(&self);
        let downwards = thread::spawn(move || down.downwards());
        let ended = self.upwards(&doorbells);
        // The crate sees the end, and so does the thread that listens to it.
        self.dma.close();
        self.crate_side.shutdown(std::net::Shutdown::Both).unwrap_or_default();
        self.client.shutdown(std::net::Shutdown::Both).unwrap_or_default();
        if downwards.join().is_err() {
            return Err(Error::other("the way back has failed"));
        }
        ended
    }

    fn to_client(&self, message: &Message) -> Result<()> {
        let _sending = lock(&self.sending);
        message.send(self.client.as_fd())
    }

    fn refuse(&self, header: Header, errno: u32) -> Result<()> {
        if header.flags & NO_REPLY != 0 { Ok(()) } else { self.to_client(&header.error(errno)) }
    }

    fn upwards(&self, doorbells: &Doorbells) -> Result<()> {
        while let Some(message) = Message::receive(self.client.as_fd())? {
            let header = message.header;
            log::trace!("front: from the client {header:?}");
            if header.is_reply() {
                self.dma.answered(message);
                continue;
            }
            match header.command {
                command::VERSION => {
                    *lock(&self.proposed) = (wire::minor(&message.body), wire::capabilities(&message.body));
                    message.send(self.crate_side.as_fd())?;
                }
                command::REGION_WRITE_MULTI => self.write_multi(&message)?,
                command::GET_REGION_IO_FDS => match doorbells.answer(&message) {
                    Some(answer) => self.to_client(&answer)?,
                    None => self.refuse(header, EINVAL)?,
                },
                known if command::IN_CRATE.contains(&known) => message.send(self.crate_side.as_fd())?,
                _ => self.refuse(header, ENOTSUP)?,
            }
        }
        Ok(())
    }

    /// As single writes, so that they keep their order with all else that the client has sent.
    fn write_multi(&self, message: &Message) -> Result<()> {
        let (count, entries) = match message.body.split_first_chunk::<8>() {
            Some((count, entries)) => (u64::from_ne_bytes(*count), entries),
            None => return self.refuse(message.header, EINVAL),
        };
        let entries: Vec<&[u8]> = entries.chunks(WRITE_ENTRY).collect();
        let whole = entries.iter().all(|entry| entry.len() == WRITE_ENTRY);
        if count == 0 || count > MAX_WRITES || u64::try_from(entries.len()) != Ok(count) || !whole {
            return self.refuse(message.header, EINVAL);
        }
        let last = entries.len() - 1;
        for (number, entry) in entries.into_iter().enumerate() {
            // Offset, region and count are as in REGION_WRITE; then 8 bytes of which `count` matter.
            let (place, data) = entry.split_at(16);
            let length = place.get(12..).and_then(|length| length.first()).copied().unwrap_or(0);
            let mut body = place.to_vec();
            body.extend(data.iter().take(usize::from(length.min(8))));
            let wants_answer = number == last && message.header.flags & NO_REPLY == 0;
            let flags = if wants_answer { 0 } else { NO_REPLY };
            if wants_answer {
                lock(&self.multis).push(Multi { id: message.header.id, count });
            }
            Message::new(message.header.id, command::REGION_WRITE, flags, body)
                .send(self.crate_side.as_fd())?;
        }
        Ok(())
    }

    fn downwards(&self) -> Result<()> {
        while let Some(mut message) = Message::receive(self.crate_side.as_fd())? {
            let header = message.header;
            match header.command {
                command::VERSION if !header.is_error() => message = self.version(message)?,
                command::REGION_WRITE => {
                    let mut multis = lock(&self.multis);
                    if let Some(at) = multis.iter().position(|multi| multi.id == header.id) {
                        let multi = multis.remove(at);
                        message = if header.is_error() {
                            Header { command: command::REGION_WRITE_MULTI, ..header }.error(EINVAL)
                        } else {
                            let count = multi.count.to_ne_bytes().to_vec();
                            Message::new(header.id, command::REGION_WRITE_MULTI, wire::REPLY, count)
                        };
                    }
                }
                _ => {}
            }
            self.to_client(&message)?;
        }
        Ok(())
    }

    /// The crate's answer with other capabilities, none above what the client proposed.
    fn version(&self, mut message: Message) -> Result<Message> {
        let (minor, proposed) = lock(&self.proposed).clone();
        let number = |name: &str, default: u64| proposed.get(name).and_then(Value::as_u64).unwrap_or(default);
        let most = number("max_data_xfer_size", 1 << 20).min(self.options.max_data_xfer_size);
        self.dma.limit(most);
        let mut capabilities = json!({
            "max_msg_fds": number("max_msg_fds", 1).min(u64::from(self.options.max_msg_fds)),
            "max_data_xfer_size": most,
        });
        if proposed.get("write_multiple").and_then(Value::as_bool) == Some(true) {
            set(&mut capabilities, "write_multiple", json!(true));
        }
        let twin = proposed.pointer("/twin_socket/supported").and_then(Value::as_bool) == Some(true);
        if twin && self.options.twin_socket {
            let (ours, theirs) = UnixStream::pair()?;
            self.dma.over(ours)?;
            set(&mut capabilities, "twin_socket", json!({ "supported": true, "fd_index": 0 }));
            message.fds = vec![OwnedFd::from(theirs)];
        }
        log::info!("front: offered {capabilities}");
        // Minor 1 knows of all that the front adds; the crate says 0.
        message.body = [0_u16, minor.min(1)].into_iter().flat_map(u16::to_ne_bytes).collect();
        message.body.extend(json!({ "capabilities": capabilities }).to_string().into_bytes());
        message.body.push(0);
        Ok(message)
    }
}

fn set(object: &mut Value, name: &str, value: Value) {
    if let Some(object) = object.as_object_mut() {
        object.insert(name.to_owned(), value);
    }
}

/// The end of a stream in the middle of a message.
fn cut_off() -> Error {
    Error::new(ErrorKind::UnexpectedEof, "the stream ends within a message")
}

fn borrowed(fds: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    fds.iter().map(AsFd::as_fd).collect()
}
