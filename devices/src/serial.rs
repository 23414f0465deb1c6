//! The 16550 serial port: vm-superio's registers behind a lock, with an eventfd as its interrupt. Must never
//! lose a typed byte: the caller keeps the bytes that do not fit into the FIFO. While the output takes no
//! more bytes, the line status reads "transmitter not empty", as on a real line.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, eventfd};
use vm_superio::Trigger;
use vm_superio::serial::{Error as UartError, NoEvents, Serial as Uart};

use crate::bus::BusDevice;
use crate::lock;

/// Adds one to an eventfd.
fn ring(fd: BorrowedFd<'_>) -> io::Result<()> {
    match rustix::io::write(fd, &1_u64.to_ne_bytes()) {
        // A full counter is a signal already.
        Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn new_eventfd() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?)
}

struct Interrupt(OwnedFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        ring(self.0.as_fd())
    }
}

/// The output of the guest's bytes. Called on vCPU threads and by the control loop.
pub trait Transmitter: Send + Sync {
    /// Takes a byte. Never waits.
    fn send(&self, byte: u8);

    /// Whether the output has no room for a byte now.
    fn is_full(&self) -> bool;

    /// Waits a few milliseconds for room. Called when a guest sends without having checked the line status.
    fn hold(&self);
}

/// Takes every byte and discards it.
impl Transmitter for () {
    fn send(&self, _: u8) {}
    fn is_full(&self) -> bool {
        false
    }
    fn hold(&self) {}
}

struct Sender(Arc<dyn Transmitter>);

impl Write for Sender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        bytes.iter().for_each(|byte| self.0.send(*byte));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct State {
    uart: Uart<Interrupt, NoEvents, Sender>,
    /// The last value that was written to the modem control register. In loop mode no input is taken.
    modem_control: u8,
    /// Input was refused, and its owner waits for the space event.
    starved: bool,
}

impl State {
    fn takes_input(&self) -> bool {
        self.modem_control & Serial::MCR_LOOP == 0 && self.uart.fifo_capacity() >= Serial::FIFO / 2
    }

    fn read(&mut self, register: u8) -> u8 {
        let mut value = self.uart.read(register);
        if (register == Serial::LSR || register == Serial::IIR) && self.uart.writer().0.is_full() {
            match register {
                Serial::LSR => value &= !Serial::LSR_TRANSMITTER_EMPTY,
                _ if value & Serial::IIR_REASON == Serial::IIR_TRANSMITTER_EMPTY => {
                    value = value & !Serial::IIR_REASON | Serial::IIR_NONE;
                }
                _ => {}
            }
        }
        // vm-superio drops "received data" as soon as one byte is read. A driver that reads a part of the
        // input, as Linux does after 256 bytes, then reads the identification register again. It must find
        // there that more input waits.
        if register == Serial::IIR && value & Serial::IIR_NONE != 0 && self.may_announce_input() {
            return value & !Serial::IIR_NONE | Serial::IIR_RECEIVED;
        }
        value
    }

    /// Whether input waits and the guest has enabled its interrupt.
    fn may_announce_input(&mut self) -> bool {
        self.uart.read(Serial::LSR) & Serial::LSR_DATA_READY != 0
            && self.uart.read(Serial::LCR) & Serial::LCR_DIVISOR == 0
            && self.uart.read(Serial::IER) & Serial::IER_RECEIVED != 0
    }

    fn write(&mut self, register: u8, value: u8) {
        if register == Serial::MCR {
            self.modem_control = value;
        }
        if let Err(error) = self.uart.write(register, value) {
            log::debug!("serial: {error}");
        }
    }
}

/// A 16550 at eight I/O ports.
///
/// Reads and writes come on vCPU threads; a write waits no longer than [`Transmitter::hold`] does. The
/// control loop calls [`Serial::enqueue`] and [`Serial::output_space`].
pub struct Serial {
    state: Mutex<State>,
    output: Arc<dyn Transmitter>,
    interrupt: OwnedFd,
    space: OwnedFd,
}

impl Serial {
    /// Length of the range of I/O ports.
    pub const LENGTH: u64 = 8;
    const FIFO: usize = 64;
    const IER: u8 = 1;
    const IIR: u8 = 2;
    const LCR: u8 = 3;
    const MCR: u8 = 4;
    const SCR: u8 = 7;
    const MCR_LOOP: u8 = 1 << 4;
    const LSR: u8 = 5;
    const LSR_DATA_READY: u8 = 1;
    const LSR_TRANSMITTER_EMPTY: u8 = 0x60;
    const LCR_DIVISOR: u8 = 1 << 7;
    const IER_RECEIVED: u8 = 1;
    const IIR_NONE: u8 = 1;
    const IIR_RECEIVED: u8 = 4;
    const IIR_TRANSMITTER_EMPTY: u8 = 2;
    const IIR_REASON: u8 = 0x0f;

    /// A serial port that sends each byte to `output` at once.
    ///
    /// # Errors
    /// When no eventfd is to be had.
    pub fn new(output: Arc<dyn Transmitter>) -> io::Result<Self> {
        let interrupt = new_eventfd()?;
        let uart = Uart::new(Interrupt(interrupt.try_clone()?), Sender(Arc::clone(&output)));
        let state = State { uart, modem_control: 0, starved: false };
        Ok(Self { state: Mutex::new(state), output, interrupt, space: new_eventfd()? })
    }

    /// The eventfd that is signalled for every interrupt.
    pub fn interrupt(&self) -> BorrowedFd<'_> {
        self.interrupt.as_fd()
    }

    /// An eventfd that becomes readable when there is room again after [`Serial::enqueue`] took less
    /// than it was given. Clear it with [`Serial::clear_input_space`] before the next attempt.
    pub fn input_space(&self) -> BorrowedFd<'_> {
        self.space.as_fd()
    }

    /// Clears the event of [`Serial::input_space`].
    pub fn clear_input_space(&self) {
        let mut count = [0; 8];
        if let Err(error) = rustix::io::read(&self.space, &mut count)
            && error != rustix::io::Errno::AGAIN
        {
            log::debug!("serial: cannot clear the space event: {error}");
        }
    }

    /// Puts typed bytes into the FIFO and returns how many were taken, counted from the first. The caller
    /// keeps the rest until [`Serial::input_space`] becomes readable.
    pub fn enqueue(&self, bytes: &[u8]) -> usize {
        let mut state = lock(&self.state);
        let room = state.uart.fifo_capacity();
        let accepted = match state.uart.enqueue_raw_bytes(bytes) {
            Ok(accepted) => accepted,
            Err(UartError::FullFifo) => 0,
            Err(error) => {
                // The bytes are in the FIFO. Only the interrupt failed.
                log::warn!("serial: {error}");
                bytes.len().min(room)
            }
        };
        state.starved = accepted < bytes.len();
        accepted
    }

    /// The output has room again: interrupts a guest that waits for an empty transmitter.
    pub fn output_space(&self) {
        let mut state = lock(&self.state);
        // vm-superio raises the interrupt of an empty transmitter when the interrupt enable register is
        // written. That register is the divisor's high byte while the divisor latch is open, so the latch is
        // closed meanwhile.
        let control = state.uart.read(Self::LCR);
        state.write(Self::LCR, control & !Self::LCR_DIVISOR);
        let enabled = state.uart.read(Self::IER);
        state.write(Self::IER, enabled);
        state.write(Self::LCR, control);
    }

    /// Sets the registers to their values at power-on. Input in the FIFO stays.
    pub fn reset(&self) {
        let mut state = lock(&self.state);
        // Latch open: 9600 baud. Latch closed: 8 bits, no interrupts, OUT2.
        for (register, value) in [
            (Self::LCR, 0x83),
            (0, 12),
            (1, 0),
            (Self::LCR, 3),
            (Self::IER, 0),
            (Self::MCR, 8),
            (Self::SCR, 0),
        ] {
            state.write(register, value);
        }
        // Reading the interrupt identification register acknowledges the pending interrupt.
        state.uart.read(Self::IIR);
        self.signal_space(&mut state);
    }

    fn signal_space(&self, state: &mut State) {
        if state.starved && state.takes_input() {
            state.starved = false;
            if let Err(error) = ring(self.space.as_fd()) {
                log::warn!("serial: cannot signal space for input: {error}");
            }
        }
    }
}

impl BusDevice for Serial {
    /// A read of more than one byte is a string instruction: that many reads of the same register.
    fn read(&self, offset: u64, data: &mut [u8]) {
        let Ok(register) = u8::try_from(offset) else { return data.fill(0xff) };
        let mut state = lock(&self.state);
        for byte in data {
            *byte = state.read(register);
        }
        self.signal_space(&mut state);
    }

    /// A write of more than one byte is a string instruction: that many writes to the same register.
    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(register) = u8::try_from(offset) else { return };
        for byte in data {
            if register == 0 && self.output.is_full() {
                self.output.hold();
            }
            let mut state = lock(&self.state);
            state.write(register, *byte);
            self.signal_space(&mut state);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use std::sync::Arc;

    #[derive(Clone, Default)]
    struct Output(Arc<Mutex<Vec<u8>>>);

    /// Full from the third byte on.
    impl Transmitter for Output {
        fn send(&self, byte: u8) {
            lock(&self.0).push(byte);
        }
        fn is_full(&self) -> bool {
            lock(&self.0).len() > 2
        }
        fn hold(&self) {}
    }

    fn is_readable(fd: BorrowedFd<'_>) -> bool {
        let mut fds = [PollFd::new(&fd, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    }

    fn read(serial: &Serial, register: u8) -> u8 {
        let mut data = [0];
        serial.read(register.into(), &mut data);
        data[0]
    }

    #[test]
    fn written_bytes_reach_the_output_in_order() {
        let output = Output::default();
        let serial = Serial::new(Arc::new(output.clone())).unwrap();
        serial.write(0, b"a");
        serial.write(0, b"bcd");
        assert_eq!(*lock(&output.0), b"abcd");
    }

    #[test]
    fn input_interrupts_only_when_the_guest_enabled_it() {
        let serial = Serial::new(Arc::new(())).unwrap();
        assert_eq!(serial.enqueue(b"x"), 1);
        assert!(!is_readable(serial.interrupt()));
        serial.write(Serial::IER.into(), &[1]);
        assert!(is_readable(serial.interrupt()), "input that waits interrupts as soon as it may");
        assert_eq!(read(&serial, 0), b'x');
    }

    #[test]
    fn input_beyond_the_fifo_is_turned_away_and_nothing_is_lost() {
        let serial = Serial::new(Arc::new(())).unwrap();
        let typed: Vec<u8> = (0..=255).collect();
        let mut rest = typed.as_slice();
        let mut seen = Vec::new();
        while !rest.is_empty() {
            let accepted = serial.enqueue(rest);
            rest = &rest[accepted..];
            if rest.is_empty() {
                break;
            }
            assert!(!is_readable(serial.input_space()));
            while !is_readable(serial.input_space()) {
                seen.push(read(&serial, 0));
            }
            serial.clear_input_space();
        }
        while seen.len() < typed.len() {
            seen.push(read(&serial, 0));
        }
        assert_eq!(seen, typed);
    }

    #[test]
    fn input_refused_in_loop_mode_is_asked_for_again_when_it_ends() {
        let serial = Serial::new(Arc::new(())).unwrap();
        serial.write(Serial::MCR.into(), &[Serial::MCR_LOOP]);
        assert_eq!(serial.enqueue(b"abc"), 0);
        assert!(!is_readable(serial.input_space()));
        serial.write(Serial::MCR.into(), &[8]);
        assert!(is_readable(serial.input_space()));
        assert_eq!(serial.enqueue(b"abc"), 3);
    }

    #[test]
    fn a_driver_that_reads_a_part_of_the_input_hears_that_there_is_more() {
        let serial = Serial::new(Arc::new(())).unwrap();
        serial.write(Serial::IER.into(), &[1]);
        assert_eq!(serial.enqueue(b"ab"), 2);
        assert_eq!(read(&serial, Serial::IIR), 0xc4);
        assert_eq!((read(&serial, 0), read(&serial, Serial::IIR)), (b'a', 0xc4));
        assert_eq!((read(&serial, 0), read(&serial, Serial::IIR)), (b'b', 0xc1));
    }

    #[test]
    fn reset_clears_registers_and_keeps_input() {
        let serial = Serial::new(Arc::new(())).unwrap();
        for (register, value) in [(Serial::SCR, 0x55), (Serial::IER, 0xf), (Serial::LCR, 0x80)] {
            serial.write(register.into(), &[value]);
        }
        assert_eq!(serial.enqueue(b"z"), 1);
        serial.reset();
        assert_eq!((read(&serial, Serial::SCR), read(&serial, Serial::IER)), (0, 0));
        assert_eq!((read(&serial, Serial::LCR), read(&serial, Serial::IIR)), (3, 0xc1));
        assert_eq!(read(&serial, 0), b'z');
    }

    #[test]
    fn a_transmitter_whose_output_is_full_is_empty_again_when_there_is_room() {
        let output = Output::default();
        let serial = Serial::new(Arc::new(output.clone())).unwrap();
        serial.write(Serial::IER.into(), &[2]);
        assert_eq!((read(&serial, Serial::IIR), read(&serial, Serial::LSR)), (0xc2, 0x60));
        serial.write(0, b"ab");
        assert_eq!((read(&serial, Serial::IIR), read(&serial, Serial::LSR)), (0xc2, 0x60));
        serial.write(0, b"c");
        assert_eq!((read(&serial, Serial::IIR), read(&serial, Serial::LSR)), (0xc1, 0));
        rustix::io::read(serial.interrupt(), &mut [0; 8]).unwrap();
        lock(&output.0).clear();
        serial.write(Serial::LCR.into(), &[0x83]);
        serial.output_space();
        assert_eq!(read(&serial, Serial::LCR), 0x83);
        serial.write(Serial::LCR.into(), &[3]);
        assert!(is_readable(serial.interrupt()));
        assert_eq!((read(&serial, Serial::IIR), read(&serial, Serial::LSR)), (0xc2, 0x60));
    }

    #[test]
    fn bytes_are_sent_though_the_transmitter_is_not_empty() {
        let output = Output::default();
        let serial = Serial::new(Arc::new(output.clone())).unwrap();
        serial.write(0, b"abcdef");
        assert_eq!(*lock(&output.0), b"abcdef");
    }
}
