/* lowband for programs that train already: their parameters and gradients, lowband's exchange and update.
 *
 * A program makes a world (how its processes reach each other), describes its parameters, makes an optimizer,
 * and after every backward pass calls `lowband_step` on every process. lowband exchanges what the update
 * needs, and nothing else has to be exchanged: not the gradients, not the weights.
 *
 * Every function that can fail returns a status; `lowband_last_error` says what was expected and what was
 * found. Nothing is thrown across this boundary. Functions marked "Collective" are called by all processes of
 * the world, in the same order; a mistake of one process is then reported by all. Threads: one at a time for
 * each world; `lowband_last_error` is that of the calling thread.
 *
 * Enumerations are passed as int32_t. Structs begin with their size, which `*_defaults` fills in: those of
 * the library's version, so a program runs with the library whose header it was compiled with, as the soname
 * sees to. Later versions append fields only, and accept the sizes of earlier ones where structs come in.
 */
#ifndef LOWBAND_PLUGIN_LOWBAND_H
#define LOWBAND_PLUGIN_LOWBAND_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* 2 added lowband_state_place_of, 3 more kinds of optimizers and their options, 4 blocks of parameters, 5
 * CUDA devices, 6 lowband_last_report. */
#define LOWBAND_ABI_VERSION 6

typedef enum lowband_status {
  LOWBAND_OK = 0,
  LOWBAND_INVALID_ARGUMENT = 1, /* the caller's mistake; the message names field, value found, expected */
  LOWBAND_BUDGET_EXCEEDED = 2,  /* would send more than was allowed; nothing was sent */
  LOWBAND_PEER_FAILED = 3,      /* another process failed, is gone or silent; the world is broken */
  LOWBAND_MISMATCH = 4,         /* processes made different calls; the world is broken */
  LOWBAND_TRANSPORT = 5,        /* MPI or UCX refused, or is not built in */
  LOWBAND_INTERNAL = 6          /* out of memory, or a defect of lowband */
} lowband_status;

/* Of the last call on this thread that did not return LOWBAND_OK; valid until the next one. */
const char* lowband_last_error(void);
/* LOWBAND_ABI_VERSION of the library. */
int lowband_abi_version(void);
/* "0.1.0" */
const char* lowband_version(void);
/* What is built in, of "mpi,ucx,cuda". */
const char* lowband_features(void);
/* Threads that lowband computes with when it is called on this thread. */
lowband_status lowband_set_compute_threads(int threads);

/* ---- The world ---- */

typedef struct lowband_world lowband_world;

/* MPI_COMM_WORLD. Initialises MPI unless the program has (then with MPI_THREAD_MULTIPLE), and finalises it
 * only in the first case. Collective. */
lowband_status lowband_world_from_mpi(lowband_world** world);

/* UCX between processes that meet at a TCP port of process 0, as whom RANK, WORLD_SIZE, MASTER_ADDR,
 * MASTER_PORT, LOWBAND_TOKEN and LOWBAND_RENDEZVOUS_SECONDS in the environment say. Collective. */
lowband_status lowband_world_from_environment(lowband_world** world);

typedef struct lowband_meeting {
  int64_t struct_bytes;
  int32_t process;
  int32_t processes;
  const char* address; /* a name or address of process 0's host */
  int32_t port;        /* free on that host */
  const char* token;   /* a secret of the job, may be empty */
  double deadline_seconds;
} lowband_meeting;
void lowband_meeting_defaults(lowband_meeting* meeting);
/* The same, said by the program. Collective. */
lowband_status lowband_world_from_tcp(const lowband_meeting* meeting, lowband_world** world);

/* all <- the `bytes` bytes that every process gives, by process, as MPI_Allgather does. Returns 0, or another
 * number when it failed. */
typedef int (*lowband_all_gather)(void* context, const void* own, void* all, int64_t bytes);
/* UCX between processes that the program can make exchange a few addresses: over a communicator of MPI,
 * torch's process group, or whatever it has. `all_gather` is not called after this returns. Collective. */
lowband_status lowband_world_from_all_gather(int process, int processes, lowband_all_gather all_gather,
                                             void* context, lowband_world** world);

int lowband_world_process(const lowband_world* world);
int lowband_world_processes(const lowband_world* world);
/* How long a call waits for another process: 20 seconds at first. Of optimizers made afterwards. */
lowband_status lowband_world_set_deadline(lowband_world* world, double seconds);
/* Breaks the world for all its processes: their calls return LOWBAND_PEER_FAILED with this reason. */
lowband_status lowband_world_abort(lowband_world* world, const char* reason);
/* After its optimizer. Collective, unless the world is broken. NULL is legal. */
void lowband_world_free(lowband_world* world);

/* ---- Parameters ---- */

typedef enum lowband_dtype { LOWBAND_F32 = 0, LOWBAND_F64 = 1 } lowband_dtype;

/* What a parameter does. Up to LOWBAND_MATRIX they are matrices that travel as low-rank factors; the rest is
 * updated element by element and travels as it is. */
typedef enum lowband_role {
  LOWBAND_QUERY = 0,
  LOWBAND_KEY = 1,
  LOWBAND_VALUE = 2,
  LOWBAND_OUTPUT = 3,
  LOWBAND_GATE = 4,
  LOWBAND_UP = 5,
  LOWBAND_DOWN = 6,
  LOWBAND_MATRIX = 7, /* any other matrix; structural and inverted profiles have no rank for it */
  LOWBAND_EMBEDDING = 8,
  LOWBAND_HEAD = 9,
  LOWBAND_NORM = 10 /* gains and biases: without weight decay */
} lowband_role;

/* The dimension that the tensor axis cuts into consecutive pieces, the larger ones first. */
typedef enum lowband_cut { LOWBAND_UNCUT = 0, LOWBAND_CUT_ROWS = 1, LOWBAND_CUT_COLS = 2 } lowband_cut;

/* A matrix that shares a parameter with others: its next `lines` rows, or columns, belong to this one, those
 * after them to the next in the list, and so on by turns until all are taken.
 *
 * Query, key and value in one matrix, as Megatron-core interleaves them: {query, heads of a group x
 * head_dim}, {key, head_dim}, {value, head_dim}. Gate and up, of which T tensor processes hold a piece of
 * each: {gate, ffn_width / T}, {up, ffn_width / T}. */
typedef struct lowband_block {
  int32_t role; /* lowband_role, up to LOWBAND_MATRIX */
  int64_t lines;
  int64_t factor_rank; /* LOWBAND_EXPLICIT; otherwise 0 */
} lowband_block;

/* Weight and gradient of a parameter, as this process holds them. Everything but the pointers to them is
 * equal on all processes. What is not used is zero. */
typedef struct lowband_parameter {
  const char* name; /* unique */
  int32_t role;     /* lowband_role */
  int32_t cut;      /* lowband_cut */
  int64_t rows;     /* of the whole matrix: fan-out; 1 for a vector */
  int64_t cols;     /* fan-in */
  /* Memory of the host, or of options.device, row-major without gaps, of the tensor axis's piece. Borrowed
   * until the optimizer is freed. */
  void* weight;
  void* gradient;
  int64_t factor_rank; /* LOWBAND_EXPLICIT: of a matrix; 0 for what is none, and in any other profile */
  /* Since version 4. The matrices that its rows or columns belong to, each with a rank, a state and an update
   * of its own; not with LOWBAND_ADAMW, LOWBAND_SGD and LOWBAND_LION, to which they mean nothing. None: the
   * parameter is one matrix. Read while the optimizer is made. */
  const lowband_block* blocks;
  int32_t block_count;
  int32_t blocks_of_columns; /* 0: of rows */
} lowband_parameter;

/* ---- The optimizer ---- */

typedef enum lowband_optimizer_kind {
  LOWBAND_DION = 0,
  LOWBAND_POWER_SGD = 1,
  LOWBAND_ADAMW = 2, /* this and the following update element by element, and exchange dense gradients */
  LOWBAND_SGD = 3,
  LOWBAND_LION = 4,
  /* Layer matrices by the sign of their momentum or gradient, which cross the replica axis dense. */
  LOWBAND_MUON = 5,
  LOWBAND_NORMUON = 6,
  LOWBAND_MUONBP = 7, /* depends on mesh_shard and mesh_tensor, which cut the blocks */
  LOWBAND_DION2 = 8,
  LOWBAND_NORDION2 = 9,
  LOWBAND_SPECGD = 10,
  LOWBAND_SPECTRA = 11, /* dense too */
  LOWBAND_ACP_SGD = 12, /* one factor by turns: has factor ranks, as Dion and PowerSGD have */
  LOWBAND_GALORE = 13   /* projected gradients: has factor ranks */
} lowband_optimizer_kind;

typedef enum lowband_sign {
  LOWBAND_NEWTON_SCHULZ_5 = 0,
  LOWBAND_POLAR_EXPRESS_5 = 1,
  LOWBAND_POLAR_EXPRESS_8 = 2
} lowband_sign;

/* What the sign of an m x n matrix is multiplied by, besides the learning rate. */
typedef enum lowband_update_scale {
  LOWBAND_RMS_TO_RMS = 0, /* sqrt(m / n) */
  LOWBAND_ADAM_RMS = 1,   /* 0.2 sqrt(max(m, n)) */
  LOWBAND_SHAPE = 2,      /* sqrt(max(1, m / n)) */
  LOWBAND_NONE = 3        /* 1 */
} lowband_update_scale;

/* Which factor rank a matrix gets. */
typedef enum lowband_profile {
  LOWBAND_UNIFORM = 0,    /* uniform_rank */
  LOWBAND_STRUCTURAL = 1, /* FFN width; query, key, output 4 head_dim; value head_dim; times scale */
  LOWBAND_INVERTED = 2,   /* FFN width; query, key, output head_dim; value width; times scale */
  LOWBAND_FRACTION = 3,   /* ceil(min(rows, cols) fraction_numerator / fraction_denominator) */
  LOWBAND_EXPLICIT = 4    /* lowband_parameter.factor_rank */
} lowband_profile;

/* How matrices cross the replica axis; the update is the same to rounding. */
typedef enum lowband_exchange {
  LOWBAND_SEND_FACTORS = 0,
  LOWBAND_SEND_DENSE = 1,
  LOWBAND_SEND_FEWER = 2 /* whichever is fewer elements */
} lowband_exchange;

typedef struct lowband_options {
  int64_t struct_bytes;
  int32_t dtype; /* lowband_dtype, of all weights and gradients */
  /* process = tensor + mesh_tensor (shard + mesh_shard replica); the product is the world's size. Replicas
   * and shards see different data; optimizer state is cut over shards, matrices over tensor. 0 replicas: as
   * many as the world allows. */
  int32_t mesh_replica;
  int32_t mesh_shard;
  int32_t mesh_tensor;
  int32_t kind;        /* lowband_optimizer_kind */
  double mu;           /* momentum of Dion */
  double lambda;       /* momentum of PowerSGD, after decompression */
  double weight_decay; /* decoupled */
  /* LOWBAND_ADAMW, LOWBAND_SGD or LOWBAND_LION: of what is no matrix, beside Dion and PowerSGD. */
  int32_t scalar_kind;
  int32_t sgd_nesterov;
  double sgd_momentum;
  double adamw_beta1;
  double adamw_beta2;
  double adamw_epsilon;
  double lion_beta1;
  double lion_beta2;
  double clip_norm;          /* of the mean gradient over everything; 0: not clipped */
  int32_t clip_by_true_norm; /* Dion only knows an estimate, unless the exchange is within one replica */
  int32_t
      aggregated_residual; /* remove the mean R from the momentum or error instead of this replica's own */
  int32_t bf16_factors;    /* round factors to bfloat16 on the replica axis */
  int32_t overlap;         /* exchange on a thread of its own while gradients are still being announced */
  int64_t bucket_elements; /* overlap: gradient elements of an exchange */
  uint64_t seed;
  int32_t exchange; /* lowband_exchange */
  int32_t profile;  /* lowband_profile */
  int64_t uniform_rank;
  int64_t width;
  int64_t head_dim;
  double scale;
  int64_t fraction_numerator;
  int64_t fraction_denominator;
  /* Most payload bytes that one step may send on the replica axis for factors and dense gradients, summed
   * over the processes of one replica; < 0: what is planned. More is refused, here and before every transfer.
   */
  int64_t budget_bytes;
  /* Since version 3; `mu` also is the momentum of the Muons, Dion2s and Spectra, `lambda` that of ACP-SGD. */
  int32_t sign;             /* lowband_sign, of the kinds that take signs */
  int32_t update_scale;     /* lowband_update_scale, of the same but SpecGD */
  int32_t nesterov;         /* the Muons: the sign of G + mu M */
  int32_t dion2_random;     /* the Dion2s: slices are drawn, in place of those of largest norm */
  double normuon_beta2;     /* of NorMuon's and NorDion2's mean squares of rows */
  int64_t muonbp_period;    /* steps from one sign of whole matrices to the next */
  double muonbp_block_rate; /* learning rate of the steps between, relative to that of the others */
  int64_t dion2_numerator;  /* of the fraction of slices that are signed */
  int64_t dion2_denominator;
  double spectra_fraction; /* of min(m, n) singular values that are brought down */
  int64_t spectra_iterations;
  double galore_scale;     /* beside the learning rate */
  int64_t galore_interval; /* steps from one basis to the next */
  /* Since version 4. */
  int64_t parameter_bytes; /* sizeof(lowband_parameter), which lowband_options_defaults fills in */
  /* Since version 5. The CUDA device in whose memory all weights and gradients of this process lie, and where
   * the optimizer computes and keeps its state; -1: the host. On all processes or on none; LOWBAND_F32, and
   * without `overlap`. What replicas exchange passes through pinned host memory. Calls leave it the calling
   * thread's current CUDA device. */
  int64_t device;
} lowband_options;
void lowband_options_defaults(lowband_options* options);

typedef struct lowband_optimizer lowband_optimizer;

/* One optimizer at a time for each world. Collective; equal `options` and `parameters` apart from the
 * pointers, which is checked. */
lowband_status lowband_optimizer_create(lowband_world* world, const lowband_parameter* parameters,
                                        int64_t parameter_count, const lowband_options* options,
                                        lowband_optimizer** optimizer);
/* Before its world. NULL is legal. On a device: when the program's own work on the state is over. */
void lowband_optimizer_free(lowband_optimizer* optimizer);

/* Memory of parameter `parameter` (its position) from now on, between steps, in the same place as before. */
lowband_status lowband_rebind(lowband_optimizer* optimizer, int64_t parameter, void* weight, void* gradient);

/* The gradient of a parameter is complete for this step and will not be touched until `lowband_step` has
 * returned, so its exchange may start. Never required. Collective, in any order. */
lowband_status lowband_gradient_ready(lowband_optimizer* optimizer, int64_t parameter);

typedef struct lowband_step_info {
  int64_t struct_bytes;
  int64_t step;                /* 0-based */
  double learning_rate;        /* of matrices */
  double scalar_learning_rate; /* of everything else */
  int32_t diagnose;            /* see lowband_diagnosis_of */
  /* Since version 5. On a device: the cudaStream_t of the program, NULL its default stream. The step begins
   * when what is in it so far is over, and what comes to it afterwards begins when the step is over. */
  void* stream;
} lowband_step_info;
void lowband_step_info_defaults(lowband_step_info* info);

typedef struct lowband_step_report {
  int64_t struct_bytes;
  double gradient_norm;     /* of the mean gradient, before clipping (PowerSGD: of what it decompressed) */
  double clip_scale;        /* <= 1 */
  int64_t skipped_matrices; /* left alone for a gradient that is not finite */
  int64_t skipped_other;
  int64_t dead_columns;
  int64_t householder_fallbacks;
  double seconds;
  double communication_seconds;
  double exposed_seconds; /* of communication, during which this call waited */
} lowband_step_report;
void lowband_step_report_defaults(lowband_step_report* report);

/* Weights <- their update from the gradients, each the mean over this process's own data. May leave anything
 * in the gradients. `report` may be NULL: on a device the step then does not wait for it, where no other
 * process has to be waited for; of a state that is not finite the next call tells. Collective, equal `info`,
 * which is checked. */
lowband_status lowband_step(lowband_optimizer* optimizer, const lowband_step_info* info,
                            lowband_step_report* report);
/* The report of the last step; waits until a device has done it. LOWBAND_INTERNAL, on all processes alike,
 * when a state is not finite although its gradients were. */
lowband_status lowband_last_report(lowband_optimizer* optimizer, lowband_step_report* report);

/* ---- What it did ---- */

typedef enum lowband_purpose {
  LOWBAND_FACTOR = 0,     /* P and R */
  LOWBAND_DENSE = 1,      /* gradients that are not compressed, between replicas */
  LOWBAND_GRADIENT = 2,   /* dense gradients within a replica */
  LOWBAND_WEIGHT = 3,     /* updated weights within a replica */
  LOWBAND_ACTIVATION = 4, /* never, here */
  LOWBAND_CONTROL = 5,    /* norms, flags */
  LOWBAND_PERIODIC = 6    /* diagnoses */
} lowband_purpose;

typedef struct lowband_bytes {
  int64_t struct_bytes;
  int64_t calls;
  int64_t payload_bytes;      /* exact: the logical buffers of this process's collectives */
  double modelled_wire_bytes; /* what a ring would send of them */
  int64_t transport_bytes;    /* handed to the transport by this process */
  double seconds;
} lowband_bytes;
void lowband_bytes_defaults(lowband_bytes* bytes);

/* What this process moved in the last step, or since the world began, on `axis` ("replica", "shard",
 * "tensor", "within_replica", "world", "" = all) for `purpose` (lowband_purpose). */
lowband_status lowband_step_bytes(const lowband_optimizer* optimizer, const char* axis, int32_t purpose,
                                  lowband_bytes* bytes);
lowband_status lowband_total_bytes(const lowband_optimizer* optimizer, const char* axis, int32_t purpose,
                                   lowband_bytes* bytes);
/* Payload bytes that the next step sends on the replica axis, known beforehand, summed over the processes of
 * one replica. Steps are alike but with ACP-SGD and GaLore. */
lowband_status lowband_planned_bytes(const lowband_optimizer* optimizer, int64_t* factor_bytes,
                                     int64_t* dense_bytes);
/* 0 for what does not travel as factors. Of a parameter without blocks. */
lowband_status lowband_factor_rank(const lowband_optimizer* optimizer, int64_t parameter,
                                   int64_t* factor_rank);
/* Of a block; 0 is all of a parameter without blocks. */
lowband_status lowband_block_factor_rank(const lowband_optimizer* optimizer, int64_t parameter, int64_t block,
                                         int64_t* factor_rank);

typedef struct lowband_diagnosis {
  int64_t struct_bytes;
  double drift;           /* how far the replicas' residuals are apart, relative to what was to be sent */
  double mass_leak;       /* relative size of what was neither sent nor kept */
  double captured_energy; /* share of the energy that was sent */
  int64_t dead_columns;
} lowband_diagnosis;
void lowband_diagnosis_defaults(lowband_diagnosis* diagnosis);
/* Of a matrix, in the last step if that was diagnosed. Of a parameter without blocks. */
lowband_status lowband_diagnosis_of(const lowband_optimizer* optimizer, int64_t parameter,
                                    lowband_diagnosis* diagnosis);
/* Of a block; 0 is all of a parameter without blocks. */
lowband_status lowband_block_diagnosis(const lowband_optimizer* optimizer, int64_t parameter, int64_t block,
                                       lowband_diagnosis* diagnosis);

/* ---- State, for checkpoints ---- */

/* One piece of what this process must keep to go on: read it to save, overwrite it to load. Every process has
 * the same names in the same order; shapes follow the mesh, values differ between processes, and pieces may
 * be empty. With options.device some lie in its memory: copy them in the stream that the last step was given,
 * or that the next one will be given. A state fits any place, saved on a device or not. */
typedef struct lowband_state_piece {
  int64_t struct_bytes;
  const char* name; /* "<parameter>.<letter>", with "[i]" of block i; valid while the optimizer lives */
  int32_t dtype;    /* lowband_dtype */
  int64_t rows;
  int64_t cols;
  int64_t row_stride; /* elements */
  void* data;
  int64_t device; /* Since version 5. Where `data` lies: options.device, or -1 for the host. */
} lowband_state_piece;
void lowband_state_piece_defaults(lowband_state_piece* piece);
int64_t lowband_state_count(const lowband_optimizer* optimizer);
lowband_status lowband_state_at(const lowband_optimizer* optimizer, int64_t index,
                                lowband_state_piece* piece);

/* Where a piece lies in the whole tensor that the processes of one replica hold together, on any mesh: so
 * that a checkpoint of one mesh can be read on another. That of a block has the rows and columns of the
 * block. */
typedef struct lowband_state_place {
  int64_t struct_bytes;
  int64_t rows; /* of the whole */
  int64_t cols;
  int64_t row_begin; /* of the block that is cut out of it */
  int64_t row_end;
  int64_t col_begin;
  int64_t col_end;
  int64_t element_begin; /* of the block, row by row: the elements of the piece */
  int64_t element_end;
  int32_t differs_between_replicas; /* what was not sent: a momentum or an error of this replica's own. Their
                                       mean over replicas is what may not be lost. */
} lowband_state_place;
void lowband_state_place_defaults(lowband_state_place* place);
lowband_status lowband_state_place_of(const lowband_optimizer* optimizer, int64_t index,
                                      lowband_state_place* place);

#ifdef __cplusplus
}
#endif

#endif
