//! Starting and stopping rings: the second half of the typestate (the first half is [`super::session`]).
//!
//! Order of messages at the start, which every known backend accepts: \[SET_STATUS 3\], SET_FEATURES,
//! \[SET_STATUS 0xb\], \[GET/SET_INFLIGHT_FD\], SET_MEM_TABLE, \[SET_LOG_BASE\], for each ring NUM, ADDR,
//! BASE, \[ERR\], CALL, KICK, ENABLE, then \[IOTLB_MSG\], \[SET_STATUS 0xf\], one round trip, and one kick
//! for each ring. One deadline covers all of them.
//!
//! Order at the stop: GET_VRING_BASE for each ring, \[IOTLB_MSG\], \[SET_STATUS 0, or RESET_DEVICE at a
//! reset\]. Again one deadline covers all of them.
//!
//! Must never send GET_VRING_BASE to a ring that was not started.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use zerocopy::IntoBytes;

use super::backend_requests::BackendChannel;
use super::channel::Channel;
use super::features::{DriverFeatures, ProtocolFeatures, bit};
use super::inflight::{self, InflightArea};
use super::iotlb::{self, IovaMap, IovaRange};
use super::mem_table;
use super::message::{Iotlb, LogArea, VringAddr, VringState};
use super::request::Request;
use super::session::Session;
use super::vring::{Ring, RingBase, RingSpace, parse_base};
use crate::memory::{DirtyLog, Iova, MemoryMap, SharedRegion};
use crate::peer::deadline::Deadline;
use crate::peer::{Cause, Error, Stats};

/// Virtio device status bits (virtio 1.2 §2.1) as SET_STATUS carries them.
mod status {
    pub(super) const RESET: u64 = 0;
    pub(super) const ACKNOWLEDGE_AND_DRIVER: u64 = 0x3;
    pub(super) const FEATURES_OK: u64 = 0xb;
    pub(super) const DRIVER_OK: u64 = 0xf;
}

impl Session {
    /// Gives the backend guest memory and rings, and starts the rings.
    ///
    /// Blocks for one deadline at most, for all messages together. The rings' eventfds are borrowed for the
    /// call; the backend keeps its own descriptors of them until the rings stop. When a ring's layout is
    /// wrong, nothing is sent, and [`Lost`] holds the session.
    pub fn go_live(
        mut self,
        features: DriverFeatures,
        memory: &MemoryMap,
        rings: &[Ring<'_>],
    ) -> Result<LiveSession, Lost> {
        let plan = match self.plan(features, memory, rings) {
            Ok(plan) => plan,
            Err(error) => return Err(Lost { error, session: Some(Box::new(self)) }),
        };
        let iova_map = self.iova_map(features, memory);
        match self.start(features, memory, rings, (&plan, iova_map.as_deref())) {
            Ok(inflight) => Ok(LiveSession { session: self, features, addresses: plan, inflight, iova_map }),
            Err(error) => {
                // Even a refusal leaves the device half started, so the connection cannot be used on.
                self.channel.abandon();
                Err(Lost { error, session: None })
            }
        }
    }

    /// Makes every check that is possible before the first message.
    fn plan(
        &self,
        features: DriverFeatures,
        memory: &MemoryMap,
        rings: &[Ring<'_>],
    ) -> Result<Vec<VringAddr>, Error> {
        if self.channel.is_lost() {
            return Err(self.channel.error(Request::SET_FEATURES, Cause::AlreadyLost));
        }
        if features.bits() & !self.offered().bits() != 0 {
            return Err(self.channel.invalid(Request::SET_FEATURES, "a feature was not offered"));
        }
        if self.log.is_some() {
            self.log_permitted()?;
        }
        mem_table::fits(&self.channel, memory, self.mem_slots)?;
        let iova_map = self.iova_map(features, memory);
        let space = iova_map.as_deref().map_or(RingSpace::User(memory), RingSpace::Iova);
        let mut plan = Vec::with_capacity(rings.len());
        for ring in rings {
            if rings.iter().filter(|other| other.index == ring.index).count() > 1 {
                return Err(self.channel.invalid(Request::SET_VRING_NUM, "a ring is named twice"));
            }
            let mut address = ring
                .address(features, space)
                .map_err(|fault| self.channel.invalid(Request::SET_VRING_ADDR, fault.text()))?;
            address.flags = if self.log.is_some() { LOG_RING } else { 0 };
            plan.push(address);
        }
        Ok(plan)
    }

    /// The translations of a device behind an IOMMU: the given map, or the identity map. `None` without
    /// ACCESS_PLATFORM.
    fn iova_map(&self, features: DriverFeatures, memory: &MemoryMap) -> Option<Arc<IovaMap>> {
        if !features.has(bit::ACCESS_PLATFORM) {
            return None;
        }
        Some(self.iova_map.clone().unwrap_or_else(|| Arc::new(IovaMap::identity(memory))))
    }

    fn start(
        &mut self,
        features: DriverFeatures,
        memory: &MemoryMap,
        rings: &[Ring<'_>],
        (plan, iova_map): (&[VringAddr], Option<&IovaMap>),
    ) -> Result<Option<Arc<InflightArea>>, Error> {
        let told = memory.regions().iter().map(SharedRegion::size).fold(0, u64::saturating_add);
        let deadline = self.channel.deadline_of_memory(told);
        let has_status = self.channel.negotiated().contains(ProtocolFeatures::STATUS);
        let (log, kept) = (self.log.clone(), self.inflight.take());
        let channel = &mut self.channel;
        if has_status {
            set_status(channel, status::ACKNOWLEDGE_AND_DRIVER, &deadline)?;
        }
        set_features(channel, features, log.is_some(), &deadline)?;
        if has_status {
            set_status(channel, status::FEATURES_OK, &deadline)?;
        }
        let inflight = match channel.negotiated().contains(ProtocolFeatures::INFLIGHT_SHMFD) {
            true => Some(inflight::hand_over(channel, kept, rings, &deadline)?),
            false => None,
        };
        mem_table::send(channel, memory, &deadline)?;
        if let Some(log) = &log {
            // Rust backends apply SET_LOG_BASE to the current memory table only, and forget it at the next
            // table.
            set_log_base(channel, log, &deadline)?;
        }
        for (ring, address) in rings.iter().zip(plan) {
            start_ring(channel, ring, address, &deadline)?;
        }
        if let Some(map) = iova_map {
            // The backend may miss a range as soon as the first range is announced, so misses are answered
            // from here on.
            self.translating.store(true, Ordering::Release);
            iotlb::announce(channel, map, &deadline)?;
        }
        if has_status {
            set_status(channel, status::DRIVER_OK, &deadline)?;
        }
        // Some backends register a ring's kick only after they read ENABLE from the socket. A kick before
        // that would be lost, and with it the buffers that the guest put into the ring meanwhile. The answer
        // to one request proves that ENABLE was read.
        let round_trip = if has_status { Request::GET_STATUS } else { Request::GET_FEATURES };
        channel.ask_u64(round_trip, &deadline)?;
        for ring in rings {
            if channel.negotiated().contains(ProtocolFeatures::INBAND_NOTIFICATIONS) {
                let state = VringState { index: ring.index.into(), num: 0 };
                channel.exchange(Request::VRING_KICK, state.as_bytes(), &[], &deadline)?;
                continue;
            }
            ring.kick.ring().map_err(|source| channel.error(Request::SET_VRING_KICK, Cause::Io(source)))?;
        }
        Ok(inflight)
    }
}

/// Whether a started ring is enabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingSwitch {
    /// The backend processes the ring.
    Enabled,
    /// The backend processes the ring without side effects: net drops what the guest sends, and delivers
    /// nothing.
    Disabled,
}

/// How rings are stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    Drain,
    Suspend,
    Reset,
}

/// VHOST_VRING_F_LOG: writes to the used ring are logged.
pub(super) const LOG_RING: u32 = 1;

pub(super) fn set_log_base(channel: &mut Channel, log: &DirtyLog, deadline: &Deadline) -> Result<(), Error> {
    let area = LogArea { size: log.size(), offset: log.offset() };
    channel.exchange(Request::SET_LOG_BASE, area.as_bytes(), &[log.as_fd()], deadline).map(drop)
}

pub(super) fn set_features(
    channel: &mut Channel,
    features: DriverFeatures,
    logging: bool,
    deadline: &Deadline,
) -> Result<(), Error> {
    let mut bits = features.bits();
    if channel.protocol_offered() {
        bits |= 1 << bit::PROTOCOL_FEATURES;
    }
    if logging {
        bits |= 1 << bit::LOG_ALL;
    }
    channel.exchange(Request::SET_FEATURES, &bits.to_ne_bytes(), &[], deadline).map(|_| ())
}

fn set_status(channel: &mut Channel, status: u64, deadline: &Deadline) -> Result<(), Error> {
    channel.exchange(Request::SET_STATUS, &status.to_ne_bytes(), &[], deadline).map(|_| ())
}

fn start_ring(
    channel: &mut Channel,
    ring: &Ring<'_>,
    address: &VringAddr,
    deadline: &Deadline,
) -> Result<(), Error> {
    let index = u32::from(ring.index);
    let with_fd = u64::from(ring.index).to_ne_bytes();
    let state = |num: u32| VringState { index, num };
    let size = state(ring.size.into());
    channel.exchange(Request::SET_VRING_NUM, size.as_bytes(), &[], deadline)?;
    channel.exchange(Request::SET_VRING_ADDR, address.as_bytes(), &[], deadline)?;
    channel.exchange(Request::SET_VRING_BASE, state(ring.base.0).as_bytes(), &[], deadline)?;
    if let Some(error) = ring.error {
        channel.exchange(Request::SET_VRING_ERR, &with_fd, &[error.as_fd()], deadline)?;
    }
    // With in-band notifications no eventfd may be sent, as the backend would prefer it. The first VRING_KICK
    // starts the ring.
    if !channel.negotiated().contains(ProtocolFeatures::INBAND_NOTIFICATIONS) {
        channel.exchange(Request::SET_VRING_CALL, &with_fd, &[ring.call.as_fd()], deadline)?;
        channel.exchange(Request::SET_VRING_KICK, &with_fd, &[ring.kick.as_fd()], deadline)?;
    }
    if channel.protocol_offered() {
        channel.exchange(Request::SET_VRING_ENABLE, state(1).as_bytes(), &[], deadline)?;
    }
    Ok(())
}

/// A backend that processes rings.
pub struct LiveSession {
    pub(super) session: Session,
    pub(super) features: DriverFeatures,
    /// For each started ring, the addresses as the backend was told.
    pub(super) addresses: Vec<VringAddr>,
    inflight: Option<Arc<InflightArea>>,
    /// The translations of a device behind an IOMMU.
    iova_map: Option<Arc<IovaMap>>,
}

impl LiveSession {
    /// The session: the backend's features, limits and counters.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The features that the driver accepted.
    pub fn features(&self) -> DriverFeatures {
        self.features
    }

    /// The inflight area, in which the backend notes its requests in flight. When it is kept, another backend
    /// can finish those requests after this one was lost.
    pub fn inflight(&self) -> Option<&Arc<InflightArea>> {
        self.inflight.as_ref()
    }

    /// Counters of this connection.
    pub fn stats(&self) -> Stats {
        self.session.stats()
    }

    /// The backend's own channel, at the first call only, as [`Session::take_backend_channel`].
    pub fn take_backend_channel(&mut self) -> Option<BackendChannel> {
        self.session.take_backend_channel()
    }

    /// Reads the configuration space, as [`Session::read_config`].
    pub fn read_config(&mut self, size: usize) -> Result<Vec<u8>, Error> {
        self.session.read_config(size)
    }

    /// Writes to the configuration space, as [`Session::write_config`].
    pub fn write_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), Error> {
        self.session.write_config(offset, bytes)
    }

    /// Writes to the configuration space and reads it again, as [`Session::change_config`].
    pub fn change_config(&mut self, offset: u32, bytes: &[u8], size: usize) -> Result<Vec<u8>, Error> {
        self.session.change_config(offset, bytes, size)
    }

    /// Enables or disables started rings. Needs feature bit 30. Some backends ignore the request, so it is no
    /// way to pause a device. Blocks for one deadline at most, for all rings together.
    pub fn switch_rings(&mut self, indexes: &[u16], switch: RingSwitch) -> Result<(), Error> {
        let deadline = self.session.channel.deadline();
        let num = u32::from(switch == RingSwitch::Enabled);
        let channel = &mut self.session.channel;
        indexes.iter().try_for_each(|index| {
            let state = VringState { index: u32::from(*index), num };
            channel.exchange(Request::SET_VRING_ENABLE, state.as_bytes(), &[], &deadline).map(|_| ())
        })
    }

    /// Kicks a ring by message. Needs INBAND_NOTIFICATIONS. Waits until the backend has processed the
    /// message.
    pub fn kick_in_band(&mut self, index: u16) -> Result<(), Error> {
        let state = VringState { index: index.into(), num: 0 };
        self.session.channel.order(Request::VRING_KICK, state.as_bytes(), &[])
    }

    /// True when memory can be added and removed while the device runs.
    pub fn has_mem_slots(&self) -> bool {
        self.session.protocol().contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    /// Adds a region of guest memory. Needs CONFIGURE_MEM_SLOTS. All backends accept whole multiples of 2
    /// MiB.
    pub fn add_region(&mut self, region: &SharedRegion) -> Result<(), Error> {
        let deadline = self.session.channel.deadline_of_memory(region.size());
        mem_table::add(&mut self.session.channel, region, &deadline)
    }

    /// Removes a region of guest memory. Needs CONFIGURE_MEM_SLOTS.
    pub fn remove_region(&mut self, region: &SharedRegion) -> Result<(), Error> {
        let payload = mem_table::single(region);
        // No fd: backends identify the region by its addresses, and some refuse an fd.
        self.session.channel.order(Request::REM_MEM_REG, payload.as_bytes(), &[])
    }

    /// Announces a range that was added to the IOVA map. Sends nothing when the driver did not accept
    /// ACCESS_PLATFORM.
    pub fn announce(&mut self, range: &IovaRange) -> Result<(), Error> {
        match iotlb::update(range).filter(|_| self.features.has(bit::ACCESS_PLATFORM)) {
            Some(message) => self.send_iotlb(&message),
            None => Ok(()),
        }
    }

    /// Invalidates a range that was removed from the IOVA map. Sends nothing when the driver did not accept
    /// ACCESS_PLATFORM.
    pub fn revoke(&mut self, range: &IovaRange) -> Result<(), Error> {
        if !self.features.has(bit::ACCESS_PLATFORM) {
            return Ok(());
        }
        self.iotlb_invalidate(range.iova, range.size)
    }

    /// Invalidates translations. The backend does not use them any more when this returns.
    pub fn iotlb_invalidate(&mut self, at: Iova, size: u64) -> Result<(), Error> {
        self.send_iotlb(&iotlb::invalidation(at, size))
    }

    fn send_iotlb(&mut self, message: &Iotlb) -> Result<(), Error> {
        self.session.channel.order(Request::IOTLB_MSG, message.as_bytes(), &[])
    }

    /// Stops every ring, and returns each ring's base in the order in which the rings were started.
    ///
    /// Blocks for one deadline at most. The backend finishes its requests in flight first. There is one
    /// exception: where GET_VRING_BASE_INFLIGHT was negotiated without GET_VRING_BASE_SKIP_DRAIN, the backend
    /// never finishes them, and the session keeps the inflight area for the next start. In all cases the
    /// backend touches neither guest memory nor the eventfds afterwards.
    pub fn stop(self) -> Result<(Session, Vec<RingBase>), Lost> {
        self.stop_as(Stop::Drain)
    }

    /// Stops every ring as [`LiveSession::stop`] does, and resets the device as the guest did. The reset is
    /// sent by SET_STATUS, or without STATUS by RESET_DEVICE, if the backend has that. A backend that refuses
    /// the reset has stopped its rings all the same.
    pub fn reset(self) -> Result<Session, Lost> {
        self.stop_as(Stop::Reset).map(|(session, _)| session)
    }

    /// Stops every ring without waiting for requests in flight, where the backend can
    /// (GET_VRING_BASE_SKIP_DRAIN, or the older GET_VRING_BASE_INFLIGHT). Those requests stay noted in the
    /// inflight area, which the session keeps for the next start. For other backends it does the same as
    /// [`LiveSession::stop`].
    pub fn suspend(self) -> Result<(Session, Vec<RingBase>), Lost> {
        let can = self.session.protocol().contains(ProtocolFeatures::GET_VRING_BASE_INFLIGHT);
        self.stop_as(if can { Stop::Suspend } else { Stop::Drain })
    }

    fn stop_as(mut self, how: Stop) -> Result<(Session, Vec<RingBase>), Lost> {
        let deadline = self.session.channel.deadline();
        let never_drains = self.session.protocol().contains(ProtocolFeatures::GET_VRING_BASE_INFLIGHT)
            && !self.session.protocol().contains(ProtocolFeatures::GET_VRING_BASE_SKIP_DRAIN);
        let suspends = how == Stop::Suspend || (how == Stop::Drain && never_drains);
        match self.stop_rings(how, &deadline) {
            Ok(bases) => {
                // After a suspension the next start must hand the inflight area over. After a drain the area
                // is not needed any more.
                self.session.inflight = self.inflight.filter(|_| suspends);
                Ok((self.session, bases))
            }
            Err(error) => {
                self.session.channel.abandon();
                Err(Lost { error, session: None })
            }
        }
    }

    fn stop_rings(&mut self, how: Stop, deadline: &Deadline) -> Result<Vec<RingBase>, Error> {
        let channel = &mut self.session.channel;
        let skips = channel.negotiated().contains(ProtocolFeatures::GET_VRING_BASE_SKIP_DRAIN);
        let request = match how {
            Stop::Suspend if skips => Request::GET_VRING_BASE_SKIP_DRAIN,
            _ => Request::GET_VRING_BASE,
        };
        let mut bases = Vec::with_capacity(self.addresses.len());
        for address in self.addresses.drain(..) {
            let state = VringState { index: address.index, num: 0 };
            let answered = channel.exchange(request, state.as_bytes(), &[], deadline)?;
            let base = parse_base(&answered.payload, address.index, self.features);
            bases.push(base.map_err(|fault| channel.malformed(request, fault))?);
        }
        if let Some(map) = self.iova_map.take() {
            self.session.translating.store(false, Ordering::Release);
            iotlb::revoke(channel, &map, deadline)?;
        }
        if channel.negotiated().contains(ProtocolFeatures::STATUS) {
            set_status(channel, status::RESET, deadline)?;
        } else if how == Stop::Reset && channel.negotiated().contains(ProtocolFeatures::RESET_DEVICE) {
            match channel.exchange(Request::RESET_DEVICE, &[], &[], deadline) {
                Err(error) if error.is_fatal() => return Err(error),
                Err(error) => log::debug!("{error}"),
                Ok(_) => {}
            }
        }
        Ok(bases)
    }
}

impl AsFd for LiveSession {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.session.as_fd()
    }
}

/// The error of a failed step. The connection is lost, too, unless the mistake was on our side.
pub struct Lost {
    error: Error,
    session: Option<Box<Session>>,
}

impl Lost {
    /// The cause of the failure.
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// The error, and the session if it can still be used because nothing was sent.
    pub fn into_parts(self) -> (Error, Option<Session>) {
        (self.error, self.session.map(|session| *session))
    }
}

impl From<Lost> for Error {
    fn from(lost: Lost) -> Self {
        lost.error
    }
}

impl fmt::Debug for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let session = if self.session.is_some() { "usable" } else { "lost" };
        f.debug_struct("Lost").field("error", &self.error).field("session", &session).finish()
    }
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for Lost {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&self.error)
    }
}
