//! DMA_READ and DMA_WRITE: the device asks, the client answers, in the middle of whatever else goes on.

use std::collections::HashMap;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use super::lock;
use super::wire::{Message, command};
use crate::guest_memory::Messages;

/// How long the client may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Who waits, by the request's identifier; none once the client has gone.
type Waiting = Option<HashMap<u16, SyncSender<Message>>>;

/// Requests to the client, and who waits for which answer.
pub(super) struct Dma {
    client: Arc<UnixStream>,
    sending: Arc<Mutex<()>>,
    /// The socket of our requests, when it is not the client's.
    twin: Mutex<Option<UnixStream>>,
    waiting: Arc<Mutex<Waiting>>,
    next: AtomicU16,
    limit: AtomicU64,
}

impl Dma {
    pub(super) fn new(client: Arc<UnixStream>, sending: Arc<Mutex<()>>) -> Self {
        Self {
            client,
            sending,
            twin: Mutex::default(),
            waiting: Arc::new(Mutex::new(Some(HashMap::new()))),
            next: AtomicU16::new(0),
            limit: AtomicU64::new(4096),
        }
    }

    /// Bytes of data in a message.
    pub(super) fn limit(&self, bytes: u64) {
        self.limit.store(bytes.clamp(8, 1 << 20), Ordering::Relaxed);
    }

    /// From now on requests go over this socket.
    pub(super) fn over(&self, twin: UnixStream) -> Result<()> {
        let (answers, waiting) = (twin.try_clone()?, Arc::clone(&self.waiting));
        thread::spawn(move || {
            while let Ok(Some(message)) = Message::receive(answers.as_fd()) {
                give(&waiting, message);
            }
        });
        *lock(&self.twin) = Some(twin);
        Ok(())
    }

    /// A reply has come on the client's socket.
    pub(super) fn answered(&self, message: Message) {
        give(&self.waiting, message);
    }

    /// The client has gone: nobody waits any longer.
    pub(super) fn close(&self) {
        *lock(&self.waiting) = None;
        if let Some(twin) = lock(&self.twin).take() {
            twin.shutdown(std::net::Shutdown::Both).unwrap_or_default();
        }
    }

    fn ask(&self, command: u16, body: Vec<u8>) -> Result<Message> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver): (_, Receiver<Message>) = sync_channel(1);
        let gone = || Error::new(ErrorKind::NotConnected, "the client has gone");
        lock(&self.waiting).as_mut().ok_or_else(gone)?.insert(id, sender);
        let message = Message::new(id, command, 0, body);
        match &*lock(&self.twin) {
            Some(twin) => message.send(twin.as_fd())?,
            None => {
                let _sending = lock(&self.sending);
                message.send(self.client.as_fd())?;
            }
        }
        let answer = receiver.recv_timeout(PATIENCE);
        if let Some(waiting) = lock(&self.waiting).as_mut() {
            waiting.remove(&id);
        }
        let answer = answer.map_err(|error| Error::other(format!("no answer: {error}")))?;
        if answer.header.is_error() || answer.header.command != command {
            return Err(Error::other(format!("refused: {:?}", answer.header)));
        }
        Ok(answer)
    }

    /// Cuts a range into messages.
    fn in_pieces(&self, address: u64, length: usize) -> Vec<(u64, std::ops::Range<usize>)> {
        let most = usize::try_from(self.limit.load(Ordering::Relaxed)).unwrap_or(4096);
        let starts = (0..length).step_by(most);
        starts
            .map(|start| {
                let offset = u64::try_from(start).unwrap_or(u64::MAX);
                (address.saturating_add(offset), start..(start + most).min(length))
            })
            .collect()
    }
}

fn give(waiting: &Mutex<Waiting>, message: Message) {
    let waiter = lock(waiting).as_mut().and_then(|waiting| waiting.remove(&message.header.id));
    match waiter {
        // One that has given up meanwhile needs no answer.
        Some(waiter) => waiter.send(message).unwrap_or_default(),
        None => log::warn!("front: a reply to nothing: {:?}", message.header),
    }
}

/// Address and count, as every DMA message begins.
fn range(address: u64, count: usize) -> Vec<u8> {
    let count = u64::try_from(count).unwrap_or(u64::MAX);
    [address, count].into_iter().flat_map(u64::to_ne_bytes).collect()
}

impl Messages for Dma {
    fn read(&self, address: u64, data: &mut [u8]) -> Result<()> {
        for (at, piece) in self.in_pieces(address, data.len()) {
            let place = data.get_mut(piece).unwrap_or_default();
            let asked = range(at, place.len());
            let answer = self.ask(command::DMA_READ, asked.clone())?;
            match answer.body.split_at_checked(asked.len()) {
                Some((echo, bytes)) if echo == asked && bytes.len() == place.len() => {
                    place.copy_from_slice(bytes);
                }
                _ => return Err(Error::other("a reply to DMA_READ of another shape")),
            }
        }
        Ok(())
    }

    fn write(&self, address: u64, data: &[u8]) -> Result<()> {
        for (at, piece) in self.in_pieces(address, data.len()) {
            let bytes = data.get(piece).unwrap_or_default();
            let asked = range(at, bytes.len());
            let answer = self.ask(command::DMA_WRITE, [asked.as_slice(), bytes].concat())?;
            // libvfio-user takes address and count for granted, so a reply without them is a fault.
            if answer.body != asked {
                return Err(Error::other("a reply to DMA_WRITE of another shape"));
            }
        }
        Ok(())
    }
}
