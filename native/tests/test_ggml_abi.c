/* Compiles only if src/ggml_abi.h declares what the installed ggml.h declares. There is nothing to run. */
#include <ggml.h>

#include "ggml_abi.h"

#define SAME_ID(name, id) _Static_assert(GGML_TYPE_##name == (id), "the id of " #name);
ET_GGML_TYPES(SAME_ID)

/* A storage type is passed as an int; an enumeration of the same size is passed alike. */
_Static_assert(sizeof(enum ggml_type) == sizeof(int), "enum ggml_type is not passed as int");

#define SAME_FUNCTION(returned, name, parameters)                                                                      \
    _Static_assert(__builtin_types_compatible_p(returned(*) parameters, __typeof__(&ggml_##name)), "ggml_" #name);
ET_GGML_FUNCTIONS(SAME_FUNCTION, enum ggml_type, struct ggml_type_traits)

#define SAME_MEMBER(ours, theirs)                                                                                      \
    _Static_assert(offsetof(struct et_ggml_traits, ours) == offsetof(struct ggml_type_traits, theirs) &&               \
                       sizeof(((struct et_ggml_traits *)0)->ours) == sizeof(((struct ggml_type_traits *)0)->theirs),   \
                   "struct ggml_type_traits: " #theirs);
SAME_MEMBER(name, type_name)
SAME_MEMBER(block_size, blck_size)
SAME_MEMBER(interleave, blck_size_interleave)
SAME_MEMBER(block_bytes, type_size)
SAME_MEMBER(quantized, is_quantized)
SAME_MEMBER(to_float, to_float)
SAME_MEMBER(from_float, from_float_ref)
_Static_assert(sizeof(struct et_ggml_traits) == sizeof(struct ggml_type_traits), "struct ggml_type_traits");
_Static_assert(__builtin_types_compatible_p(__typeof__(((struct et_ggml_traits *)0)->to_float), ggml_to_float_t),
               "ggml_to_float_t");
