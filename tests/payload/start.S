/*
 * The first and the last instructions of the tiny kernel: the PVH note and entry (Xen
 * "PVH direct boot", docs/misc/pvh.pandoc), flat segments, and the interrupt stubs.
 * Everything else is C. 32-bit protected mode from end to end, no paging, no SSE and no
 * string instructions, so that a KVM which emulates guest kernel code runs it as well.
 */
	.code32

/* ------------------------------------------------------------------ PVH note */
	.section .note.pvh, "a", @note
	.align	4
	.long	4f - 3f			/* name size */
	.long	6f - 5f			/* descriptor size */
	.long	18			/* XEN_ELFNOTE_PHYS32_ENTRY */
3:	.asciz	"Xen"
4:	.align	4
5:	.quad	pvh_start		/* 64 bits wide, as Linux writes it */
6:	.align	4

/* ------------------------------------------------------------------ entry
 * PVH hands over: %ebx = &hvm_start_info, flat CS/DS/ES/SS whose descriptors may be gone
 * from memory by now, interrupts off, no stack.
 */
	.section .text.start, "ax"
	.globl	pvh_start
pvh_start:
	cld
	lgdt	gdt_pointer
	ljmp	$0x08, $1f
1:	movl	$0x10, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
	movl	$stack_top, %esp

	/* After a reboot in place .bss may hold what the last life left there. */
	movl	$bss_start, %eax
2:	cmpl	$bss_end, %eax
	jae	3f
	movl	$0, (%eax)
	addl	$4, %eax
	jmp	2b

3:	pushl	%ebx
	call	payload_main
	/* payload_main ends the machine; it does not return. */
4:	cli
	hlt
	jmp	4b

/* ------------------------------------------------------------------ interrupts
 * One stub for each vector the payload uses. All meet in one frame, `struct frame` of
 * machine.h, whose address is the argument of `interrupt()`.
 */
	.macro	stub number, error_code=0
	.text
9:
	.if	\error_code == 0
	pushl	$0
	.endif
	pushl	$\number
	jmp	common
	.section .rodata
	.long	9b
	.endm

	.section .rodata
	.align	4
	.globl	stub_table
stub_table:				/* vectors 0 to 31, then 0x40 to 0x43 */
	.irp	n, 0, 1, 2, 3, 4, 5, 6, 7
	stub	\n
	.endr
	stub	8, 1
	stub	9
	.irp	n, 10, 11, 12, 13, 14
	stub	\n, 1
	.endr
	stub	15
	stub	16
	stub	17, 1
	.irp	n, 18, 19, 20
	stub	\n
	.endr
	stub	21, 1
	.irp	n, 22, 23, 24, 25, 26, 27, 28
	stub	\n
	.endr
	stub	29, 1
	stub	30, 1
	stub	31
	.irp	n, 0x40, 0x41, 0x42, 0x43
	stub	\n
	.endr

	.text
common:
	pushal
	pushl	%esp
	call	interrupt
	addl	$4, %esp
	/*
	 * Back without `iret`, which a KVM that emulates guest kernel code cannot do in
	 * protected mode. Vector and error code are popped; EIP, CS and EFLAGS become EFLAGS
	 * and EIP, since the ring and the segment stay the same.
	 */
	movl	40(%esp), %eax		/* EIP */
	movl	48(%esp), %ecx		/* EFLAGS */
	movl	%ecx, 44(%esp)
	movl	%eax, 48(%esp)
	popal
	addl	$12, %esp
	popfl				/* the next interrupt may come here: the stack is whole */
	ret

/* ------------------------------------------------------------------ other CPUs
 * They wake in real mode at the page that the start-up interrupt names, where payload.c has
 * put a copy of this: each counts itself and sleeps.
 */
	.section .rodata
	.globl	ap_start, ap_count, ap_end
	.code16
ap_start:
	cli
	lock incw %cs:(ap_count - ap_start)
1:	hlt
	jmp	1b
	.align	2
ap_count:
	.word	0
ap_end:
	.code32

/* ------------------------------------------------------------------ tables */
	.section .rodata
	.align	8
gdt:	.quad	0
	.quad	0x00cf9b000000ffff	/* 0x08: code, base 0, limit 4 GiB */
	.quad	0x00cf93000000ffff	/* 0x10: data, base 0, limit 4 GiB */
gdt_pointer:
	.word	. - gdt - 1
	.long	gdt

	.section .noinit, "aw", @nobits
	.align	16
	.skip	4096
stack_top:

	.section .note.GNU-stack, "", @progbits
