//! A guest uses a server's function.

use super::super::server::Gone;
use super::super::testing::{self, Mood, Scripted};
use super::*;
use crate::pci::{Space, Window, Windows};
use crate::ports::Route;
use crate::testing::{Recorder, Shown};
use std::time::{Duration, Instant};
use transport::memory::GuestAddr;

const WINDOWS: Windows = Windows {
    memory32: Window { base: 0xc000_0000, size: 0x1000_0000 },
    memory64: Window { base: 0x80_0000_0000, size: 0x80_0000_0000 },
    io: Window { base: 0x1000, size: 0xf000 },
};
/// The GSI of the pin.
const PIN: u32 = 20;
/// The address that the guest gives BAR 2.
const PLACE: u64 = 0x90_0000_0000;

struct Guest {
    server: Scripted,
    machine: Recorder,
    device: Arc<VfioUserDevice>,
}

impl Guest {
    fn new() -> Self {
        Self::with(|_| ())
    }

    /// A guest whose server has a changed configuration space.
    fn with(change: impl FnOnce(&mut [u8])) -> Self {
        let (server, machine) = (Scripted::default(), Recorder::default());
        let device = testing::device_with(&server, change);
        let guest = Guest { server, machine, device };
        guest.plug();
        guest.server.calls();
        guest
    }

    /// Puts the function on another board.
    fn plug(&self) {
        self.device.plug(&self.machine.ports(), &HostBridge::new(WINDOWS), Some(PIN)).unwrap();
    }

    fn broken(&self) -> Option<String> {
        match self.device.link.gone() {
            Some(Gone::Broken(why)) => Some(why.clone()),
            _ => None,
        }
    }

    fn config(&self, at: u16) -> u32 {
        let mut data = [0; 4];
        self.device.config_read(at, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&self, at: u16, value: u32) {
        self.device.config_write(at, &value.to_le_bytes());
    }

    fn command(&self, value: u16) {
        self.device.config_write(offset::COMMAND, &value.to_le_bytes());
    }

    fn bar(&self, bar: usize, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device.bar_read(BarIndex::ALL[bar], offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set_bar(&self, bar: usize, offset: u64, value: u32) {
        self.device.bar_write(BarIndex::ALL[bar], offset, &value.to_le_bytes());
    }

    fn shown(&self) -> Vec<u64> {
        self.machine.shown().iter().map(|shown| shown.at.0).collect()
    }

    /// Gives BAR 2 the address [`PLACE`] and switches memory decoding on.
    fn enable(&self) {
        self.set(0x18, 0);
        self.set(0x1c, u32::try_from(PLACE >> 32).unwrap());
        self.command(Command::MEMORY | Command::MASTER);
        self.server.calls();
    }
}

#[test]
fn what_is_ours_is_answered_without_the_server_and_the_rest_is_asked() {
    let guest = Guest::new();
    assert_eq!(guest.config(0), 0x5678_1234);
    guest.set(0x10, u32::MAX);
    assert_eq!(guest.config(0x10), 0xffff_f000);
    assert_eq!(guest.server.calls(), ["write 7+10 [00, f0, ff, ff]"]);
    guest.set(0x10, 0xc000_0000);
    let mut byte = [0];
    guest.device.config_read(0x3d, &mut byte);
    assert_eq!(byte, [1], "the pin");
    guest.server.calls();
    assert_eq!(guest.config(0x60), 0);
    guest.device.config_write(0x62, &[1, 2]);
    guest.device.config_write(0x61, &[1, 2, 3]);
    assert_eq!(
        guest.server.calls(),
        ["read 7+60 4", "write 7+62 [01, 02]", "write 7+61 [01]", "write 7+62 [02]", "write 7+63 [03]"]
    );
    assert_eq!(guest.config(0x100), u32::MAX, "it has no extended space");
    guest.set(0x100, 0);
    guest.set(0, 0);
    guest.set(0x30, u32::MAX);
    assert_eq!(guest.config(0x30), 0);
    assert!(guest.server.calls().is_empty(), "what never changes is not forwarded");
}

#[test]
fn the_server_is_told_where_its_bars_are_at_once() {
    let guest = Guest::new();
    guest.plug();
    let told = |at: u16| format!("write 7+{at:x} {:02x?}", guest.config(at).to_le_bytes());
    // BAR 2 has 64 bits.
    let expected = [0x10, 0x18, 0x1c, 0x20].map(told);
    assert_eq!(guest.server.calls()[..4], expected, "a guest that keeps them never writes them");
    assert!(guest.config(0x10) & !15 != 0);
}

#[test]
fn the_header_of_a_capability_is_not_written_through() {
    let guest = Guest::new();
    for (at, value, told) in
        [(0x40, 0x8000_0000, "write 7+42 [00, 80]"), (0x50, 0x0001_0000, "write 7+52 [01, 00]")]
    {
        guest.set(at, value);
        assert_eq!(guest.server.calls().last().unwrap(), told, "{at:#x}");
        guest.set(at, 0);
    }
    guest.server.calls();
    guest.set(0x60, 5);
    assert_eq!(guest.server.calls(), ["write 7+60 [05, 00, 00, 00]"], "all of it is the server's");
}

#[test]
fn the_command_register_is_kept_and_forwarded() {
    let guest = Guest::new();
    guest.command(0x0547);
    assert_eq!(guest.server.calls(), ["write 7+4 [47, 05]"]);
    // The other bits are the server's, and the scripted server does not store them.
    assert_eq!(guest.config(4), 0x0010_0407);
    guest.device.config_write(offset::COMMAND + 1, &[0x01]);
    guest.device.config_write(offset::COMMAND, &[0x06]);
    let calls = guest.server.calls();
    let written: Vec<_> = calls.iter().filter(|call| call.starts_with("write")).collect();
    assert_eq!(written, ["write 7+4 [47, 01]", "write 7+4 [06, 01]"], "never half of it");
    guest.command(0x0407);
    guest.device.config_write(offset::INTERRUPT_LINE, &[11]);
    assert_eq!(guest.config(0x3c) & 0xffff, 0x010b);
}

#[test]
fn memory_of_the_server_goes_where_the_bar_goes() {
    let guest = Guest::new();
    assert!(guest.machine.shown().is_empty());
    guest.enable();
    let shown = Shown { at: GuestAddr(PLACE + 0x1000), offset: 0x5000, size: 0x2000, read_only: false };
    assert_eq!(guest.machine.shown(), [shown]);
    assert!(guest.device.decoded().iter().any(|bar| bar.base == PLACE && bar.space == Space::Memory));
    guest.set(0x1c, 0xa0);
    assert_eq!(guest.shown(), [0xa0_0000_1000]);
    guest.command(0);
    assert!(guest.shown().is_empty() && guest.device.decoded().is_empty());
    guest.command(Command::MEMORY);
    guest.set(0x1c, 0);
    assert!(guest.shown().is_empty(), "outside the windows");
}

#[test]
fn accesses_of_bars_are_the_servers() {
    let guest = Guest::new();
    guest.enable();
    assert_eq!(guest.bar(2, 0x3ffc), 0xa2a2_a2a2);
    guest.set_bar(0, 8, 5);
    guest.set_bar(2, 8, 6);
    assert_eq!(
        guest.server.calls(),
        ["read 2+3ffc 4", "post 0+8 [05, 00, 00, 00]", "write 2+8 [06, 00, 00, 00]"]
    );
    // The region ends before the BAR does.
    for (bar, offset) in [(0, 0x20), (0, 0x1d), (1, 0), (6, 0), (0, u64::MAX)] {
        assert_eq!(guest.bar(bar, offset), u32::MAX, "{bar} {offset:x}");
        guest.set_bar(bar, offset, 0);
    }
    assert!(guest.server.calls().is_empty());
    let counts = guest.device.counts();
    assert_eq!((counts.regions[0], counts.regions[2]), ((3, 4), (1, 1)));
    assert_eq!(counts.requests, 3, "the server was asked for no others");
}

#[test]
fn a_refusal_reads_all_ones_and_breaks_nothing() {
    let guest = Guest::new();
    guest.enable();
    guest.server.mood(Mood::Refuses);
    assert_eq!(guest.bar(2, 0), u32::MAX);
    guest.set_bar(2, 0, 1);
    assert_eq!(guest.config(0), 0x5678_1234);
    assert_eq!(guest.config(0x60), u32::MAX);
    guest.command(Command::MEMORY);
    assert_eq!(guest.device.link.refused(), 4);
    guest.server.mood(Mood::Works);
    assert_eq!(guest.bar(2, 0), 0xa2a2_a2a2);
}

#[test]
fn a_lost_server_leaves_nothing_but_all_ones() {
    let guest = Guest::new();
    guest.enable();
    guest.server.mood(Mood::Lost);
    assert_eq!(guest.bar(0, 0), u32::MAX);
    assert_eq!(guest.server.calls(), ["read 0+0 4", "shut down"]);
    assert!(guest.shown().is_empty() && guest.device.decoded().is_empty());
    assert_eq!((guest.bar(0, 0), guest.config(0), guest.config(0x60)), (u32::MAX, u32::MAX, u32::MAX));
    guest.set_bar(0, 0, 1);
    guest.command(7);
    assert!(guest.server.calls().is_empty(), "nobody waits for it again");
    assert_eq!(guest.broken().as_deref(), Some("it is silent"));
}

#[test]
fn memory_that_cannot_be_mapped_is_the_servers_access_by_access() {
    let guest = Guest::new();
    // As when the server's file is read-only, or consists of our own huge pages.
    guest.machine.refuse_maps();
    guest.enable();
    assert!(guest.shown().is_empty());
    guest.server.calls();
    assert_eq!(guest.bar(2, 0x1000), 0xa2a2_a2a2);
    guest.set_bar(2, 0x1000, 7);
    assert_eq!(guest.server.calls(), ["read 2+1000 4", "write 2+1000 [07, 00, 00, 00]"]);
    assert!(guest.broken().is_none());
}

#[test]
fn a_file_made_shorter_breaks_the_device() {
    let guest = Guest::new();
    guest.enable();
    guest.machine.vanish_all();
    assert_eq!(guest.config(0), u32::MAX);
    assert_eq!(guest.server.calls(), ["shut down"]);
    assert!(guest.broken().is_some_and(|why| why.contains("shorter")));
}

#[test]
fn off_its_board_the_device_is_as_after_power_on() {
    let guest = Guest::new();
    guest.enable();
    guest.device.unplug();
    assert!(guest.shown().is_empty());
    assert_eq!(guest.server.calls(), ["write 7+4 [00, 00]", "disarm Intx", "reset"]);
    guest.plug();
    assert!(guest.device.decoded().is_empty(), "until the guest enables it");
}

#[test]
fn a_device_that_the_guest_ejected_is_so_until_the_next_board() {
    let guest = Guest::new();
    assert!(!guest.device.is_ejected());
    Occupant::unplug(&*guest.device);
    assert!(guest.device.is_ejected());
    guest.plug();
    assert!(!guest.device.is_ejected());
}

/// The offsets of the capabilities, and the bits that switch them on.
const MSIX: u16 = 0x40;
const MSI: u16 = 0x50;
const MSIX_ON: u32 = 0x8000_0000;
const MSIX_MASKED: u32 = 0x4000_0000;

fn message(vector: u32) -> Route {
    Route::Message { address: 0xfee0_0000, data: 0x4000 + vector }
}

impl Guest {
    /// Writes an entry of the MSI-X table.
    fn entry(&self, vector: u32, control: u32) {
        for (register, value) in (0_u64..).zip([0xfee0_0000, 0, 0x4000 + vector, control]) {
            self.set_bar(4, u64::from(vector) * 16 + register * 4, value);
        }
    }
}

#[test]
fn msix_is_armed_before_the_server_hears_that_it_is_on() {
    let guest = Guest::new();
    guest.enable();
    guest.entry(1, 0);
    assert!(guest.server.calls().is_empty(), "the table is ours");
    guest.set(MSIX, MSIX_ON | MSIX_MASKED);
    assert_eq!(guest.server.calls(), ["disarm Intx", "arm MsiX 4", "write 7+42 [00, c0]"]);
    assert_eq!(guest.config(MSIX) & 0xffff_ff00, 0xc003_5000);
    guest.server.signal(1);
    assert!(guest.machine.routes().is_empty(), "the function is masked");
    assert_eq!(guest.bar(4, 0x800), 1 << 1, "pending");
    guest.set(MSIX, MSIX_ON);
    assert_eq!(guest.machine.routes(), [message(1)]);
    assert_eq!((guest.machine.take_interrupts(), guest.bar(4, 0x800)), (1, 0));
    guest.entry(1, 1);
    guest.server.signal(1);
    assert!(guest.machine.routes().is_empty(), "the vector is masked");
    guest.set_bar(4, 16 + 8, 0x4777);
    guest.set_bar(4, 16 + 12, 0);
    assert_eq!(guest.machine.routes(), [Route::Message { address: 0xfee0_0000, data: 0x4777 }]);
    assert_eq!(guest.machine.take_interrupts(), 1);
    guest.server.calls();
    guest.set(MSIX, 0);
    assert_eq!(guest.server.calls(), ["disarm MsiX", "arm Intx 1", "write 7+42 [00, 00]", "unmask"]);
    assert!(guest.machine.routes().is_empty());
}

#[test]
fn msi_is_armed_with_all_its_vectors() {
    let guest = Guest::new();
    guest.enable();
    guest.set(MSI + 4, 0xfee0_0000);
    guest.set(MSI + 12, 0x4000);
    guest.server.calls();
    guest.device.config_write(MSI + 2, &[0x91, 0]);
    assert_eq!(guest.server.calls(), ["disarm Intx", "arm Msi 2", "write 7+52 [91, 00]"]);
    assert_eq!(guest.machine.routes(), [message(0), message(1)]);
    assert_eq!(guest.config(MSI), 0x0093_7005);
    guest.server.signal(1);
    assert_eq!(guest.machine.take_interrupts(), 1);
}

#[test]
fn the_pin_is_a_level_that_the_server_raises_again() {
    let guest = Guest::new();
    guest.set(0x18, 0);
    guest.command(Command::MEMORY);
    assert_eq!(guest.server.calls()[1..], ["arm Intx 1", "write 7+4 [02, 00]", "unmask"]);
    guest.server.signal(0);
    assert_eq!(guest.machine.take_raised(), [(PIN, 1)]);
    guest.machine.end_of_interrupt(PIN);
    guest.device.pin_served();
    guest.device.pin_served();
    assert_eq!(guest.server.calls(), ["unmask"]);
    guest.command(Command::MEMORY | Command::INTX_DISABLE);
    assert_eq!(guest.server.calls(), ["disarm Intx", "write 7+4 [02, 04]"]);
    assert!(guest.machine.take_raised().is_empty());
}

#[test]
fn a_server_that_refuses_its_eventfds_is_given_up_unless_it_is_the_pin() {
    let guest = Guest::new();
    guest.server.mood(Mood::Refuses);
    guest.command(Command::MEMORY);
    assert_eq!(guest.server.calls(), ["arm Intx 1", "write 7+4 [02, 00]"]);
    guest.set(MSIX, MSIX_ON);
    assert_eq!(guest.server.calls(), ["arm MsiX 4", "shut down"]);
    assert_eq!(guest.config(0), u32::MAX);
}

#[test]
fn what_is_signalled_while_it_is_off_is_forgotten() {
    let guest = Guest::new();
    guest.enable();
    guest.entry(0, 0);
    guest.set(MSIX, MSIX_ON | MSIX_MASKED);
    guest.server.signal(0);
    guest.device.unplug();
    guest.plug();
    let calls = guest.server.calls();
    assert_eq!(&calls[calls.len() - 7..calls.len() - 4], ["disarm MsiX", "write 7+42 [00, 00]", "reset"]);
    guest.entry(0, 0);
    guest.set(MSIX, MSIX_ON);
    assert_eq!((guest.machine.routes(), guest.machine.take_interrupts()), (vec![message(0)], 0));
}

#[test]
fn accesses_across_the_edge_of_the_table_are_nobodys() {
    let guest = Guest::new();
    guest.enable();
    let mut eight = [0; 8];
    guest.device.bar_read(BarIndex::ALL[4], 0x3c, &mut eight);
    assert_eq!(eight, [0xff; 8]);
    guest.device.bar_write(BarIndex::ALL[4], 0x3c, &eight);
    assert_eq!(guest.bar(4, 0x3c), 1, "masked as it was");
    assert_eq!(guest.bar(4, 0x40), 0xa4a4_a4a4, "behind it is the server");
}

#[test]
fn a_reset_of_the_function_leaves_it_as_after_power_on() {
    let guest = Guest::new();
    guest.enable();
    guest.entry(0, 0);
    guest.set(MSIX, MSIX_ON);
    guest.server.calls();
    // Not the reset bit, but the bits and bytes beside it.
    guest.device.config_write(0x78, &[0, 0x7f]);
    assert_eq!(guest.machine.routes(), [message(0)]);
    guest.device.config_write(0x78, &[0, 0x80]);
    // libvfio-user keeps the command register and the enable bit over a reset. Without these writes it would
    // keep MSI-X when the guest switches the pin on.
    let off = ["write 7+4 [00, 00]", "disarm MsiX", "write 7+42 [00, 00]"];
    assert_eq!(guest.server.calls(), [&["write 7+78 [00, 7f]"], &off[..], &["write 7+78 [00, 80]"]].concat());
    assert!(
        guest.machine.routes().is_empty() && guest.shown().is_empty() && guest.device.decoded().is_empty()
    );
    assert_eq!((guest.config(4) & 7, guest.config(0x1c), guest.config(MSIX) >> 16), (0, 0, 3));
    guest.enable();
    assert_eq!(guest.bar(4, 12), 1, "vectors begin masked");
    guest.entry(0, 0);
    guest.set(MSIX, MSIX_ON);
    guest.server.signal(0);
    assert_eq!(guest.machine.take_interrupts(), 1);
}

#[test]
fn a_vector_whose_route_was_refused_has_it_at_its_next_change() {
    for capability in [0x40_u16, 0x50] {
        let guest = Guest::new();
        guest.enable();
        // The guest gives vector 0 of MSI-X a message before it switches MSI-X on.
        for (at, value) in [(0, 0xfee0_0000), (8, 0x40), (12, 0)] {
            guest.set_bar(4, at, value);
        }
        guest.set(0x54, 0xfee0_0000);
        guest.machine.refuse_routes();
        let on = if capability == 0x40 { [0x00, 0x80] } else { [0x01, 0x00] };
        guest.device.config_write(capability + 2, &on);
        assert!(guest.machine.routes().is_empty());
        guest.machine.accept_routes();
        if capability == 0x40 {
            guest.set_bar(4, 12, 1);
            guest.set_bar(4, 12, 0);
        } else {
            guest.set(0x54, 0xfee0_1000);
        }
        assert_eq!(guest.machine.routes().len(), 1, "{capability:#x}");
    }
}

/// A virtio function whose common configuration is at 0x100 of BAR 2.
fn virtio(config: &mut [u8]) {
    config[0..2].copy_from_slice(&[0xf4, 0x1a]);
    config[0x71] = 0xb0;
    config[0xb0..0xbc].copy_from_slice(&[9, 0, 16, 1, 2, 0, 0, 0, 0, 1, 0, 0]);
}

#[test]
fn the_status_of_a_lost_virtio_function_reads_0_once_it_was_reset() {
    const STATUS: u64 = 0x114;
    let guest = Guest::with(virtio);
    guest.enable();
    guest.server.mood(Mood::Lost);
    assert_eq!(guest.bar(2, 0), u32::MAX);
    assert!(guest.device.decoded().iter().any(|bar| bar.base == PLACE), "or no access reaches it");
    assert_eq!((guest.bar(2, STATUS), guest.config(0)), (u32::MAX, u32::MAX));
    assert_eq!(guest.config(0x1c), u32::try_from(PLACE >> 32).unwrap(), "where it is");
    guest.set_bar(2, STATUS + 4, 0);
    guest.set_bar(2, STATUS, 1);
    assert_eq!(guest.bar(2, STATUS), u32::MAX, "nobody has reset it");
    guest.device.bar_write(BarIndex::ALL[2], STATUS, &[0]);
    let mut byte = [0xff];
    guest.device.bar_read(BarIndex::ALL[2], STATUS, &mut byte);
    assert_eq!((byte, guest.bar(2, STATUS), guest.bar(2, STATUS - 2)), ([0], 0, 0));
    assert_eq!(
        (guest.bar(2, STATUS - 4), guest.bar(2, STATUS + 4), guest.bar(0, STATUS)),
        (u32::MAX, u32::MAX, u32::MAX)
    );
    guest.set_bar(2, STATUS, 3);
    assert_eq!(guest.bar(2, STATUS), 0, "a driver that goes on finds no device");
    guest.command(7);
    assert!(guest.shown().is_empty() && guest.device.decoded().len() == 3, "and nothing moves");
}

#[test]
fn a_server_that_dies_of_its_reset_at_the_end_has_done_nothing_wrong() {
    for (ending, mood, is_broken) in
        [(true, Mood::Closes, false), (true, Mood::Lost, true), (false, Mood::Closes, true)]
    {
        let guest = Guest::new();
        guest.enable();
        if ending {
            guest.device.link.ending();
        }
        guest.server.mood(mood);
        guest.device.unplug();
        assert_eq!(guest.broken().is_some(), is_broken, "{ending} {mood:?}");
        assert!(guest.device.link.is_gone());
    }
}

#[test]
fn a_server_that_lives_and_closes_its_connection_has_removed_the_device() {
    for (is_dead, is_broken) in [(false, false), (true, true)] {
        let guest = Guest::new();
        guest.enable();
        lock(&guest.server.0).is_dead = is_dead;
        guest.device.link.hung_up();
        guest.device.tidy();
        assert_eq!(guest.broken().is_some(), is_broken);
        assert_eq!((guest.config(0), guest.shown().len()), (u32::MAX, 0));
    }
}

#[test]
fn all_that_one_access_takes_shares_one_deadline() {
    let guest = Guest::new();
    guest.enable();
    // Each request is answered within the deadline; a reset of the function takes three requests.
    guest.server.mood(Mood::Slow(Duration::from_millis(300)));
    let begun = Instant::now();
    guest.device.config_write(0x78, &[0, 0x80]);
    assert!(begun.elapsed() < Duration::from_millis(890), "{:?}", begun.elapsed());
    assert!(guest.broken().is_some_and(|why| why.contains("within 500 ms what one access takes")));
}
