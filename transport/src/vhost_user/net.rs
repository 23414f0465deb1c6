//! NET_SET_MTU and SEND_RARP: what only network back-ends understand.

use super::error::Error;
use super::live::LiveSession;
use super::request::Request;
use super::session::Session;

/// The payload of SEND_RARP: the MAC in the first 6 bytes.
fn rarp(mac: [u8; 6]) -> [u8; 8] {
    let [a, b, c, d, e, f] = mac;
    [a, b, c, d, e, f, 0, 0]
}

impl Session {
    /// Tells the back-end the MTU that the guest sees. Needs MTU; only with VIRTIO_NET_F_MTU.
    pub fn set_mtu(&mut self, mtu: u16) -> Result<(), Error> {
        let deadline = self.channel.deadline();
        let payload = u64::from(mtu).to_ne_bytes();
        self.channel.exchange(Request::NET_SET_MTU, &payload, &[], &deadline).map(|_| ())
    }
}

impl LiveSession {
    /// Has the back-end announce `mac` on its network after a migration. Needs RARP; for guests that do not
    /// announce themselves (VIRTIO_NET_F_GUEST_ANNOUNCE).
    pub fn send_rarp(&mut self, mac: [u8; 6]) -> Result<(), Error> {
        let deadline = self.session.channel.deadline();
        self.session.channel.exchange(Request::SEND_RARP, &rarp(mac), &[], &deadline).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mac_is_in_the_first_six_bytes() {
        assert_eq!(rarp([1, 2, 3, 4, 5, 6]), [1, 2, 3, 4, 5, 6, 0, 0]);
    }
}
