use super::*;
use crate::testing::Recorder;

const ON: u16 = ENABLE;

fn msix(machine: &Recorder, vectors: u16) -> Msix {
    Msix::new(vectors, machine.ports().interrupts)
}

fn call() -> Arc<Call> {
    Arc::new(Call::new().unwrap())
}

/// What Linux writes for a vector.
fn program(msix: &mut Msix, vector: u64, data: u32) {
    msix.write_table(vector * ENTRY, &0xfee0_1000_u32.to_le_bytes()).unwrap();
    msix.write_table(vector * ENTRY + 4, &0_u32.to_le_bytes()).unwrap();
    msix.write_table(vector * ENTRY + 8, &data.to_le_bytes()).unwrap();
}

fn mask(msix: &mut Msix, vector: u64, masked: u32) {
    msix.write_table(vector * ENTRY + 12, &masked.to_le_bytes()).unwrap();
}

fn message(data: u32) -> Route {
    Route::Message { address: 0xfee0_1000, data }
}

fn pending(msix: &Msix) -> u64 {
    let mut data = [0; 8];
    msix.read_pba(0, &mut data);
    u64::from_le_bytes(data)
}

#[test]
fn a_vector_is_live_when_msix_is_on_and_neither_mask_is_set() {
    let machine = Recorder::default();
    let mut msix = msix(&machine, 3);
    msix.connect(Some(1), call()).unwrap();
    program(&mut msix, 1, 0x41);
    for (control, masked, live) in [
        (0, 1, false),
        (0, 0, false),
        (ON, 1, false),
        (ON | FUNCTION_MASK, 0, false),
        (ON, 0, true),
        (FUNCTION_MASK, 0, false),
    ] {
        msix.set_control(control).unwrap();
        mask(&mut msix, 1, masked);
        assert_eq!(machine.routes() == [message(0x41)], live, "{control:#x} {masked}");
        assert_eq!(machine.routes().is_empty(), !live);
    }
}

#[test]
fn what_is_signalled_while_masked_is_pending_and_delivered_later() {
    let machine = Recorder::default();
    let mut msix = msix(&machine, 3);
    let call = call();
    msix.connect(Some(2), Arc::clone(&call)).unwrap();
    program(&mut msix, 2, 0x42);
    msix.set_control(ON).unwrap();
    assert_eq!(pending(&msix), 0);
    call.ring().unwrap();
    assert_eq!(pending(&msix), 1 << 2);
    mask(&mut msix, 2, 0);
    assert_eq!((pending(&msix), machine.take_interrupts()), (0, 1));
    mask(&mut msix, 2, 1);
    call.ring().unwrap();
    assert_eq!((pending(&msix), machine.take_interrupts()), (4, 0));
}

#[test]
fn a_vector_is_retargeted_while_it_is_live_and_while_it_is_masked() {
    let machine = Recorder::default();
    let mut msix = msix(&machine, 2);
    msix.connect(Some(0), call()).unwrap();
    msix.set_control(ON).unwrap();
    program(&mut msix, 0, 0x41);
    mask(&mut msix, 0, 0);
    assert_eq!(machine.routes(), [message(0x41)]);
    program(&mut msix, 0, 0x51);
    assert_eq!(machine.routes(), [message(0x51)]);
    mask(&mut msix, 0, 1);
    program(&mut msix, 0, 0x61);
    assert!(machine.routes().is_empty());
    mask(&mut msix, 0, 0);
    assert_eq!(machine.routes(), [message(0x61)]);
}

#[test]
fn calls_share_vectors_move_between_them_and_leave() {
    let machine = Recorder::default();
    let mut msix = msix(&machine, 2);
    msix.set_control(ON).unwrap();
    for vector in [0, 1] {
        program(&mut msix, vector, 0x40 + u32::try_from(vector).unwrap());
        mask(&mut msix, vector, 0);
    }
    let first = msix.connect(Some(0), call()).unwrap();
    let second = msix.connect(None, call()).unwrap();
    assert_eq!(machine.routes(), [message(0x40)]);
    msix.retarget(second, Some(0)).unwrap();
    assert_eq!(machine.routes(), [message(0x40); 2]);
    msix.retarget(first, Some(1)).unwrap();
    assert!(machine.routes().contains(&message(0x41)));
    msix.retarget(first, Some(7)).unwrap();
    assert_eq!(machine.routes(), [message(0x40)], "a vector that is not there leads nowhere");
    msix.disconnect(second);
    assert!(machine.routes().is_empty());
}

#[test]
fn a_refused_route_is_told_and_leaves_the_signal_pending() {
    let machine = Recorder::default();
    let mut msix = msix(&machine, 1);
    let call = call();
    msix.connect(Some(0), Arc::clone(&call)).unwrap();
    mask(&mut msix, 0, 0);
    machine.refuse_routes();
    msix.set_control(ON).unwrap_err();
    call.ring().unwrap();
    assert_eq!(pending(&msix), 1);
}

#[test]
fn table_reads_back_what_was_written_in_any_width_and_ends_where_it_ends() {
    let machine = Recorder::default();
    let mut msix = msix(&machine, 2);
    msix.write_table(0, &0x1_fee0_2004_u64.to_le_bytes()).unwrap();
    msix.write_table(8, &0xffff_fffe_0000_0033_u64.to_le_bytes()).unwrap();
    msix.write_table(9, &[0x22]).unwrap();
    let mut entry = [0; 16];
    msix.read_table(0, &mut entry);
    assert_eq!(entry, [4, 0x20, 0xe0, 0xfe, 1, 0, 0, 0, 0x33, 0x22, 0, 0, 0, 0, 0, 0]);
    // Across the border of two entries, and across the end.
    msix.write_table(14, &[0xff; 4]).unwrap();
    msix.write_table(30, &[0xff; 8]).unwrap();
    msix.write_table(u64::MAX - 3, &[0xff; 8]).unwrap();
    let mut rest = [0xaa; 24];
    msix.read_table(14, &mut rest);
    assert_eq!(rest, [0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let mut beyond = [0xaa; 8];
    msix.read_pba(u64::MAX - 3, &mut beyond);
    assert_eq!(beyond, [0; 8]);
}

#[test]
fn capability_tells_size_places_and_what_can_be_written() {
    let machine = Recorder::default();
    let bar = |index| BarIndex::new(index).unwrap();
    let (body, writable) = msix(&machine, 65).capability((bar(1), 0), (bar(4), 0x800));
    assert_eq!(body, [64, 0, 1, 0, 0, 0, 4, 8, 0, 0]);
    assert_eq!(writable, [0, 0xc0]);
    let many = msix(&machine, u16::MAX);
    assert_eq!((many.count(), many.control()), (2048, 2047));
}
