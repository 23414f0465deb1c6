//! GPU_SET_SOCKET: hands the back-end a socket for the display protocol, which is not ours.

use std::os::fd::BorrowedFd;

use super::error::Error;
use super::request::Request;
use super::session::Session;

impl Session {
    /// Gives a GPU back-end the socket on which it speaks to a display.
    pub fn set_gpu_socket(&mut self, socket: BorrowedFd<'_>) -> Result<(), Error> {
        let deadline = self.channel.deadline();
        self.channel.exchange(Request::GPU_SET_SOCKET, &[], &[socket], &deadline).map(|_| ())
    }
}
