//! Reading the sockets: replies are handed to the threads that wait for them, and the server's own commands
//! are answered.
//!
//! Must never block. Must never read on after an invalid message, as the beginning of the next message is
//! unknown then.

use std::time::Duration;

use zerocopy::IntoBytes;

use super::incoming::{Ahead, Incoming, Message, Read};
use super::link::{Link, Side, lock};
use super::shared::{ClientStats, Shared, Streams, ended};
use super::table::{Delivered, Reply};
use super::windows::{DmaRefusal, DmaServed};
use crate::peer::{Cause, Direction, Error, Step};
use crate::vfio_user::message::{Command, Fault, Header, Kind, length};

/// Bytes of our replies that may wait for the server to read them. While more wait, the server's commands
/// wait, too. A thread that waits for a reply of such a server finds at its deadline that the server hangs.
const REPLIES_MOST: usize = 4 << 20;

/// Reads of one socket in one call, so that a flood on one socket does not starve the others.
const BATCH: usize = 32;

/// Bytes of guest memory that are moved in one call: a message of 32 bytes may ask for a MiB.
const MOVED_MOST: u64 = 8 << 20;

impl Shared {
    /// The work of [`super::Receiver`]. Only sends while a waiting thread reads the socket.
    pub(crate) fn serve(&self) -> Result<usize, Error> {
        let mut streams = lock(&self.streams);
        // Sends even while another thread reads: that thread may not know that new messages wait to be sent.
        let flushed = self.flush(Side::Main).and_then(|()| self.flush(Side::Twin));
        if flushed.is_ok() && lock(&self.table).led {
            return Ok(0);
        }
        let served = flushed.and_then(|()| self.pump(&mut streams, &mut || false));
        served.inspect_err(|_| lock(&self.table).told())
    }

    /// Reads what has arrived, one batch of each socket, and acts on it. Ends the connection on an error.
    pub(crate) fn pump(
        &self,
        streams: &mut Streams,
        enough: &mut dyn FnMut() -> bool,
    ) -> Result<usize, Error> {
        let mut count = 0;
        for side in [Side::Main, Side::Twin] {
            let Some(link) = self.link(side) else { continue };
            let incoming = match side {
                Side::Main => &mut streams.main,
                Side::Twin => &mut streams.twin,
            };
            let moved = self.stats().dma_bytes;
            'reads: for _ in 0..BATCH {
                loop {
                    let moved = self.stats().dma_bytes.saturating_sub(moved);
                    if moved > MOVED_MOST || link.unsent() > REPLIES_MOST {
                        self.hold(link, true);
                        break 'reads;
                    }
                    let Some(message) = self.next(side, incoming)? else { break };
                    count = usize::saturating_add(count, 1);
                    self.handle(side, message)?;
                }
                self.hold(link, false);
                if enough() {
                    return Ok(count);
                }
                let due = side == Side::Main && lock(&self.table).fds_are_due();
                let brings_fds = |header: &Header| lock(&self.table).brings_fds(header);
                let ahead = if due { Ahead::Never(&brings_fds) } else { Ahead::Freely };
                match incoming.read(&link.socket, ahead) {
                    Ok(Read::Some) => {}
                    Ok(Read::Nothing) => break,
                    Ok(Read::HungUp) => return Err(self.lose(self.at_the_oldest(Cause::Closed))),
                    Err(cause) => return Err(self.lose(self.at_the_oldest(cause))),
                }
            }
        }
        Ok(count)
    }

    fn hold(&self, link: &Link, held: bool) {
        if link.hold(held) {
            self.update_watch();
        }
    }

    fn next(&self, side: Side, incoming: &mut Incoming) -> Result<Option<Message>, Error> {
        incoming.take(|header| self.judge(side, header)).map_err(|(header, fault)| {
            let command = Command(header.command);
            let step = match header.kind() {
                Ok(Kind::Command | Kind::Posted) => Step::PeerRequest(command.into()),
                _ => Step::Request(command.into()),
            };
            self.lose(Error::new(&self.peer, step, Cause::Malformed(fault)))
        })
    }

    /// The size of the payload behind `header`; a fault when no such message may come on this socket.
    fn judge(&self, side: Side, header: &Header) -> Result<u32, Fault> {
        match header.kind()? {
            Kind::Reply | Kind::ErrorReply if side == Side::Main => lock(&self.table).judge(header),
            Kind::Command | Kind::Posted if side == self.command_side() => match self.version.get() {
                Some(version) => header.judge_size(version.largest_server_payload()),
                // The server may send no command before the version is negotiated.
                None => Err(Fault::Request(u32::from(header.command))),
            },
            _ => Err(Fault::Flags(header.flags)),
        }
    }

    /// The socket on which the server's commands come.
    fn command_side(&self) -> Side {
        if self.twin.get().is_some() { Side::Twin } else { Side::Main }
    }

    fn handle(&self, side: Side, message: Message) -> Result<(), Error> {
        let Message { header, payload, fds } = message;
        let command = Command(header.command);
        let (step, fault) = match header.kind() {
            Ok(kind @ (Kind::Reply | Kind::ErrorReply)) => {
                if self.limits.trace().is_some() {
                    let sent = lock(&self.table).sent_at(header.id);
                    let took = sent.map_or(Duration::ZERO, |sent| sent.elapsed());
                    self.trace(Direction::Answer, &header, &payload, fds.len(), took);
                }
                let mut table = lock(&self.table);
                match table.deliver(&self.peer, &header, kind, Reply { payload, fds }) {
                    Ok(delivered) => {
                        let wake = table.followers > 0;
                        let due = std::mem::take(&mut table.due);
                        drop(table);
                        due.into_iter().for_each(|(then, payload)| then(&payload));
                        if wake {
                            self.answered.notify_all();
                        }
                        if delivered == Delivered::Late {
                            log::debug!("{}: a late reply to {command}", self.peer);
                            self.count(|stats| stats.late = stats.late.saturating_add(1));
                        }
                        return Ok(());
                    }
                    Err(fault) => (Step::Request(command.into()), fault),
                }
            }
            Ok(kind @ (Kind::Command | Kind::Posted)) => {
                self.trace(Direction::PeerRequest, &header, &payload, fds.len(), Duration::ZERO);
                if fds.is_empty() {
                    return self.serve_command(side, &header, kind, &payload);
                }
                let fault = Fault::Fds { got: fds.len(), least: 0, most: 0 };
                (Step::PeerRequest(command.into()), fault)
            }
            Err(fault) => (Step::PeerRequest(command.into()), fault),
        };
        Err(self.lose(Error::new(&self.peer, step, Cause::Malformed(fault))))
    }

    fn serve_command(&self, side: Side, header: &Header, kind: Kind, payload: &[u8]) -> Result<(), Error> {
        let limit = self.version.get().map_or(0, |version| version.ours.max_data_xfer_size);
        let outcome = self.dma.serve(Command(header.command), payload, limit);
        self.count(|stats| count_dma(stats, &outcome));
        if let Err(refusal) = outcome {
            log::debug!("{}: {} is refused: {refusal}", self.peer, Command(header.command));
        }
        if kind == Kind::Posted {
            return Ok(());
        }
        let (answer, data) = match &outcome {
            Ok(served) => (Header::reply(header, length(served.reply().len())), served.reply()),
            Err(refusal) => (Header::error_reply(header, refusal.errno()), &[][..]),
        };
        self.trace(Direction::OurAnswer, &answer, data, 0, Duration::ZERO);
        let Some(link) = self.link(side) else { return Ok(()) };
        let message = [answer.as_bytes(), data].concat();
        let mut outgoing = lock(&link.outgoing);
        let pushed = outgoing.push(&link.socket, message, &[]);
        let unsent = outgoing.unsent();
        drop(outgoing);
        let step = Step::PeerRequest(Command(header.command).into());
        match pushed {
            Ok(_) => {
                if unsent > 0 {
                    self.update_watch();
                }
                Ok(())
            }
            Err(source) => Err(self.lose(Error::new(&self.peer, step, ended(source)))),
        }
    }
}

fn count_dma(stats: &mut ClientStats, outcome: &Result<DmaServed, DmaRefusal>) {
    let (counter, bytes) = match outcome {
        Ok(DmaServed::Read(reply)) => (&mut stats.dma_reads, reply.len().saturating_sub(16)),
        Ok(DmaServed::Written(_, bytes)) => (&mut stats.dma_writes, *bytes),
        Err(_) => (&mut stats.server_refusals, 0),
    };
    *counter = counter.saturating_add(1);
    stats.dma_bytes = stats.dma_bytes.saturating_add(u64::try_from(bytes).unwrap_or(u64::MAX));
}
