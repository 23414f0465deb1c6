/* The modes that drive a virtio-mmio device; README.md says what each prints. */
#pragma once

void show(void);
void blk(void);
void rng(void);
void ask(void);
void loop(void);
void resize(void);
void abuse(void);
void badring(void);
void deep(void);
void drive(void);
/* Drives a PCI function. */
void pci(void);
